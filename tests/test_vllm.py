"""vLLM for the full cache: refused where it cannot serve; where it is installed, it generates and it trains.

On a CPU, vLLM's own CPU build does it. No other test needs it, and the tests that do are skipped without it.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.import_utils import is_vllm_available

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl import PteConfig
from pte_trl.evaluation.records import read_records
from pte_trl.evaluation.script import main
from pte_trl.training.config import PteGRPOConfig
from tests.models import randomise_up
from tests.test_trainer import logged, trainer_for

TARGETS = ["q_proj", "o_proj"]
needs_vllm = pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed (pip install 'pte_trl[vllm]')")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny model whose greedy text is not one token for ever, a LoRA adapter that does something, a PTE adapter."""
    folder = tmp_path_factory.mktemp("vllm")
    model, tokenizer = build(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    lora.save_pretrained(folder / "lora")
    pte = get_peft_model(lora.unload(), PteConfig(rank=4, num_global_tokens=4))
    randomise_up(pte)
    pte.save_pretrained(folder / "pte")
    some = rows("test", 6, 0, DIFFICULTIES["easy"])
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


@pytest.fixture
def on_cpu(monkeypatch):
    """What vLLM's CPU build needs; of no effect on a GPU."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "MASTER_PORT": "0", "VLLM_LOGGING_LEVEL": "WARNING"}.items():
        monkeypatch.setenv(name, value)


def evaluate(setting, out: Path, **changes) -> list[dict]:
    options = {
        "model_name_or_path": setting / "model",
        "dtype": "float32",
        "benchmarks": setting / "sums.jsonl",
        "output_dir": out,
        "max_new_tokens": 32,
        "temperature": 0.0,
        "use_cpu": "true" if not torch.cuda.is_available() else "false",
    } | changes
    main([str(part) for key, value in options.items() for part in (f"--{key}", value)])
    return read_records(out / "sums")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 48}, "budget=48: not with backend='vllm', vLLM keeps every token"),
        ({"window": 8}, "window=8: not with backend='vllm', vLLM keeps every token"),
        ({"eviction": "h2o"}, "eviction='h2o': nothing is evicted from a full cache"),
        ({"adapter": "pte"}, "is PTE, backend='vllm' takes LORA: vLLM keeps every token"),
        ({"backend": "sglang"}, "backend='sglang': must be one of transformers, vllm"),
    ],
)
def test_what_vllm_cannot_do_is_refused_with_the_reason(setting, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("pte_trl.evaluation.script.VllmSampler", lambda *_: pytest.fail("an engine was started"))
    if "adapter" in changes:
        changes = {"adapter": setting / changes["adapter"]}
    with pytest.raises((SystemExit, ValueError), match=message):
        evaluate(setting, tmp_path, **{"backend": "vllm"} | changes)


def settings_of(tmp_path, **changes) -> PteGRPOConfig:
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "use_vllm": True}
    return PteGRPOConfig(**common | changes)


@pytest.mark.parametrize("method", ["pte", "lora_c"])
def test_bounded_training_is_refused_with_the_reason(tmp_path, method):
    with pytest.raises(ValueError, match=r"use_vllm=True: method=.*vLLM keeps every token in its cache"):
        settings_of(tmp_path, method=method, window=8)


def test_training_without_vllm_stops_before_anything_loads(tmp_path):
    if is_vllm_available():
        assert settings_of(tmp_path, method="lora").use_vllm
        return
    with pytest.raises(ValueError, match="use_vllm=true: vLLM is not installed"):
        settings_of(tmp_path, method="lora")


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_greedy_text_is_that_of_transformers(setting, tmp_path, on_cpu, adapter):
    changes = {} if adapter is None else {"adapter": setting / adapter}
    ours = evaluate(setting, tmp_path / "transformers", **changes)
    theirs = evaluate(setting, tmp_path / "vllm", backend="vllm", **changes)
    assert [r["completion"] for r in theirs] == [r["completion"] for r in ours]
    assert [(r["tokens"], r["finish_reason"]) for r in theirs] == [(r["tokens"], r["finish_reason"]) for r in ours]
    assert len({r["completion"] for r in ours}) > 3, "the texts tell nothing apart"
    if adapter is not None:
        base = evaluate(setting, tmp_path / "base")
        assert all(a["completion"] != b["completion"] for a, b in zip(ours, base, strict=True))
    assert {r["backend"] for r in theirs} == {"vllm"} and theirs[0]["vllm"]


@needs_vllm
@pytest.mark.slow
def test_grpo_trains_with_vllm_colocated(setting, tmp_path, on_cpu, monkeypatch):
    """Two steps of LoRA: its log-probs are those of the trainer, after the weights have moved as well."""
    import vllm
    from trl.generation import vllm_generation
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    if not torch.cuda.is_available():
        # The CPU build packs weights at start-up and cannot take new ones then; TRL has no key for eager or dtype.
        monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
        monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        eager = functools.partial(vllm.LLM, enforce_eager=True, dtype="float32")
        monkeypatch.setattr(vllm_generation, "LLM", eager)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(
        tmp_path,
        "lora",
        model=model,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        learning_rate=0.05,
    )
    trainer.train()
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(differences) == 2 and max(differences) < 1e-3
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert max(p.abs().max() for p in moved) > 0.01
    # TRL merges the adapter into the weights for vLLM and takes it out again: equal up to rounding only.
    after = trainer.model.unload().state_dict()
    drift = max((after[name] - value).abs().max().item() for name, value in before.items())
    print(f"largest drift of a base weight by merging and unmerging: {drift:.1e}")
    assert drift < 1e-5
