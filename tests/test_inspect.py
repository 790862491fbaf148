"""What the inspection says of S is what a decode does, and the command writes its files."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pte_trl.adapter.model import pte_layers
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.schedule import Schedule
from pte_trl.inspect.plots import subplots
from pte_trl.inspect.states import by_distance, inspect, movers
from tests.forked import python
from tests.models import tiny, with_lora, with_pte

ROOT = Path(__file__).resolve().parent.parent
PROMPT, COMPLETION, WINDOW = list(range(5, 11)), torch.randint(1, 60, (24,)).tolist(), 6  # E = 2


@torch.no_grad()
def decoded_memories(model) -> list[list[torch.Tensor]]:
    """Of every layer, the memory after each eviction of a decode, token by token."""
    cache, seen = BoundedCache(WINDOW), []
    tokens = [PROMPT, *([token] for token in COMPLETION[:-1])]
    for part in tokens:
        evicted = cache.evictions
        model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
        if cache.evictions > evicted:
            seen.append([layer.accumulator[0].clone() for layer in cache.layers])
    return [list(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("update", ["recursive", "sum", "gated_sum"])
def test_the_states_are_those_of_a_decode(update):
    model = with_pte(tiny(), state_update=update)
    found = inspect(model, PROMPT, COMPLETION, Schedule(WINDOW), pad=0)
    memories = decoded_memories(model)
    assert found["evictions"] == len(memories[0]) == 9
    for layer, kept, described in zip(pte_layers(model), memories, found["layers"], strict=True):
        assert described["accumulator_norm"][1:] == pytest.approx([m.norm().item() for m in kept], rel=1e-9)
        encoder = layer.pte_encoder["default"]
        states = [encoder.state(m).flatten() for m in kept]
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairwise(states)]
        assert described["cosine_to_last"][1:] == pytest.approx(cosines, abs=1e-9)
        for shares in described["token_share"]:
            assert sum(shares) == pytest.approx(1, abs=1e-9)
    assert found["evicted"] == [[2 * k, 2 * k + 1] for k in range(9)]


def test_movers_are_sorted_and_named():
    found = inspect(with_pte(tiny()), PROMPT, COMPLETION, Schedule(WINDOW), pad=0)
    rows = movers(found, [str(n) for n in range(24)], 5)
    assert [row["moved"] for row in rows] == sorted((row["moved"] for row in rows), reverse=True)
    for layer in found["layers"]:
        sums = [sum(parts) for parts in layer["token_moved"]]
        assert sums == pytest.approx(layer["update_over_state"], rel=1e-9)
    assert all(int(row["token"]) == row["thought"] and row["thought"] // 2 + 1 == row["eviction"] for row in rows)


def test_before_the_first_eviction_an_unmoved_adapter_is_the_base():
    model = with_pte(tiny())
    for name, parameter in model.named_parameters():
        if "pte_up" in name:
            parameter.data.zero_()
    found = inspect(model, PROMPT, COMPLETION, Schedule(WINDOW), pad=0)
    means = by_distance(found["kl"], found["since_eviction"])
    assert means[-1] < 1e-12 < 1e-6 < min(means[0], means[1])
    assert sorted(means) == [-1, 0, 1]


def test_what_it_cannot_look_at():
    with pytest.raises(ValueError, match="not a PTE adapter"):
        inspect(with_lora(tiny()), PROMPT, COMPLETION, Schedule(WINDOW), pad=0)
    with pytest.raises(ValueError, match="nothing is evicted"):
        inspect(with_pte(tiny()), PROMPT, COMPLETION, Schedule(60), pad=0)
    with pytest.raises(ValueError, match="k_proj"):
        inspect(with_pte(tiny(), target_modules=["k_proj"]), PROMPT, COMPLETION, Schedule(WINDOW), pad=0)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"a figure: matplotlib is not installed; pip install 'pte_trl\[plots\]'"):
        subplots(size=(1, 1))


def test_the_command(tmp_path, monkeypatch):
    from experiments.tiny.model import build

    model, tokenizer = build(0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_pte(model)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(str(tmp_path / "adapter"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [python(), "-m", "pte_trl.inspect", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)

    done = run("adapter", "--window", "8", "--max_new_tokens", "30", "--prompt", "a1b2. Find A.")
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "adapter/inspect"
    found = json.loads((out / "inspect.json").read_text())
    assert found["evictions"] >= 5 and len(found["kl"]) == 30 and found["movers"]
    assert found["settings"]["model"] == "base"  # where the adapter was trained
    for name in ("states", "tokens", "distance"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    from pte_trl.inspect import __main__ as command

    with_lora(build(0)[0]).save_pretrained(str(tmp_path / "lora"))
    bad = {
        ("nowhere",): "'nowhere'",
        (str(tmp_path / "lora"),): "is a LORA adapter",
        (str(tmp_path / "adapter"), "--window", "0"): "window=0: must be an integer of at least 1",
        (str(tmp_path / "adapter"), "--temperature", "-1"): "temperature=-1.0: must be",
        (str(tmp_path / "adapter"), "--model", str(tmp_path / "lora")): "config.json",
        (str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--completions", "no.jsonl"): "no.jsonl",
    }
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("weights were loaded"))
    for words, sentence in bad.items():
        with pytest.raises(SystemExit, match=r"^error: ") as stopped:
            command.main(list(words))
        assert sentence in str(stopped.value), (words, stopped.value)
