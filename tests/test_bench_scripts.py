"""Every benchmark runs, small and on a CPU, and what it prints and records is what its table promises."""

import importlib
import json
import re
import shlex
import subprocess

import pytest
import torch

from benchmarks import capacity, common
from benchmarks.measure import Peak, Uncomputed, peak_bytes
from benchmarks.memory import saved_bytes
from benchmarks.models import random_model, with_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.rollout import rollout

ROOT = common.ROOT

# Arguments that make a run of seconds; the commands of `make bench-gpu` are the same scripts with larger ones.
SMALL = {
    "rollout": "--batch 2 --prompt 8 --new-tokens 24 --window 8 --turns 1 --roofline --arms pte lora_c lora generate "
    "'generate lora' continuous vllm",  # compiling takes a minute: tests/test_compiled.py
    "replay": "--lengths 24 48 --prompt 8 --window 16 --repeats 1",
    "step": "--lengths 64 --prompt 8 --window 16 --segment-length 16 --turns 1",
    "memory": "--lengths 40 80 --prompt 8 --window 8 --segment-length 8 "
    "--arms 'lora, full cache' 'pte, one pass' 'pte, segments'",
    "long": "--prompt 8 --window 16 --early 60 --late 160 --cycles 4",
    "capacity": "--new-tokens 256 --prompt 32 --window 32 --memory 0.5",
}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs a benchmark with `--record` into a folder of the test's; returns its rows."""
    monkeypatch.setattr(common, "RECORDS", tmp_path)

    def run(name: str, arguments: str) -> list[dict]:
        importlib.import_module(f"benchmarks.{name}").main([*shlex.split(arguments), "--record"])
        (kept,) = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"date", "commit", "command", "hardware"} <= kept["environment"].keys()
        assert next(iter(kept["rows"][0])) in (printed := capsys.readouterr().out) and "recorded in" in printed
        return kept["rows"]

    return run


def test_rollout_compares_every_arm_that_runs_here(bench):
    rows = {row["arm"]: row for row in bench("rollout", SMALL["rollout"])}
    assert {"pte", "lora_c", "lora", "generate", "generate lora", "continuous"} <= rows.keys()
    for row in rows.values():
        assert row["tokens/s"] > 0 and 0 < row["of roofline"] < 1 and row["over generate"] > 0
    assert rows["generate"]["over generate"] == 1
    assert rows["pte"]["GB read"] < rows["lora"]["GB read"]


def test_an_arm_of_ours_that_fails_is_no_skipped_arm(monkeypatch):
    module = importlib.import_module("benchmarks.rollout")
    monkeypatch.setattr(module, "rollout", lambda *args, **knobs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main(shlex.split(SMALL["rollout"]))


def test_replay_divides_by_lora_on_the_same_modules(bench):
    rows = bench("replay", SMALL["replay"])
    assert len(rows) == 2 * 6
    for row in rows:
        assert row["over lora"] > 0 and (
            row["arm"] not in ("lora", "lora qkvo") or row["over lora, same modules"] == 1
        )


def test_a_step_of_segments_needs_the_least_memory(bench):
    rows = bench("step", SMALL["step"])
    longest = {row["arm"]: row for row in rows}
    assert longest["pte, segments"]["step memory over lora"] < 0.8 < longest["pte, one pass"]["step memory over lora"]


@pytest.mark.thorough  # what `Uncomputed` does: below
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_computed_holds_the_same_bytes(bench, dtype, tmp_path):
    small = f"--lengths 24 --prompt 8 --window 16 --turns 1 --dtype {dtype}"
    whole = bench("step", small)
    (tmp_path / "step.json").unlink()
    counted = bench("step", f"{small} --uncomputed")
    for key in ("step MB", "peak MB"):
        assert [row[key] for row in counted] == [row[key] for row in whole]
    assert {row["seconds"] for row in counted} == {"-"}
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.step").arguments(["--uncomputed", "--device", "cuda"])


def test_what_is_not_computed_keeps_its_shape_and_leaves_integers_alone():
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)
    with Uncomputed():
        assert (a @ b).shape == (2, 4) and (a[:, :1] + a.double()).dtype == torch.float64
        assert torch.mm(a, b, out=out) is out and a.mul_(3).eq(1).all()
        assert torch.arange(3).cumsum(0).tolist() == [0, 1, 3] and a.argmax(1).tolist() == [0, 0]


def test_what_the_segments_hold_does_not_grow(bench):
    rows = {(row["completion"], row["arm"]): row for row in bench("memory", SMALL["memory"])}
    assert rows[80, "pte, segments"]["saved growth"] <= 1.05
    assert rows[80, "pte, one pass"]["saved growth"] > 1.2
    assert rows[80, "lora, full cache"]["peak growth"] > 1.3


@pytest.mark.thorough
def test_a_late_step_is_compared_with_an_early_one(bench):
    early, late = bench("long", SMALL["long"])
    assert early["over early"] == 1 and 0.2 < late["over early"] < 5
    assert 0.8 < late["memory over early"] < 1.2
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.long").main(["--window", "16", "--early", "20", "--late", "30"])


def test_rollouts_that_take_turns_stand_where_they_are_told_to():
    """Between two steps of the engine, one rollout at a time; and they end as without pauses."""
    module = importlib.import_module("benchmarks.long")
    model = with_adapter(random_model("tiny", seed=0), "pte").eval()
    kept, found = {name: EngineCache() for name in ("alone", "late", "early")}, {}

    def sampled_by_now(name: str) -> list[int]:
        return [row.count for row in kept[name].engine.rows]

    options = {"eos_token_ids": [-1], "pad_token_id": 0, "seeds": [3]}

    def sampled(name: str, count: int) -> None:
        found[name] = rollout(
            model, [[5, 6, 7]], CachePolicy(16), max_new_tokens=count, engine_cache=kept[name], **options
        )

    sampled("alone", 60)
    with module.paced_steps():
        late = module.Paced(lambda: sampled("late", 60))
        late.advance(40)
        assert sampled_by_now("late") == [41]  # the first token is drawn from the prompt
        early = module.Paced(lambda: sampled("early", 30))
        early.advance(20)
        late.advance(8)
        assert sampled_by_now("early") == [21] and sampled_by_now("late") == [49]
        assert late.is_alive()
        late.advance(100)
        early.advance(100)
        late.join()
    assert found["late"].completion_ids == found["alone"].completion_ids
    with module.paced_steps(), pytest.raises(ZeroDivisionError):
        module.Paced(lambda: 1 / 0).advance(1)


def test_every_arm_is_made_once_and_keeps_what_it_has_made(monkeypatch):
    module = importlib.import_module("benchmarks.rollout")
    made, make, engines, sample = [], module.ARMS["pte"], [], module.rollout
    monkeypatch.setitem(module.ARMS, "pte", lambda *of: made.append("pte") or make(*of))

    def watched(*prompts, engine_cache, **knobs):
        found = sample(*prompts, engine_cache=engine_cache, **knobs)
        engines.append(engine_cache.engine)
        return found

    monkeypatch.setattr(module, "rollout", watched)
    sizes = "--batch 2 --prompt 8 --new-tokens 16 --window 8"  # the warm-up on a CPU is as long
    module.main([*sizes.split(), "--arms", "pte", "--turns", "3"])
    assert made == ["pte"] and len(engines) == 4 and all(engine is engines[0] for engine in engines)


@pytest.mark.thorough  # the formula of the cache is that of tests/test_estimate.py
def test_the_count_of_the_capacity_is_the_formula_of_the_cache(bench):
    pte, lora = bench("capacity", SMALL["capacity"])
    assert pte["cache over formula"] == pytest.approx(1, abs=0.02) == lora["cache over formula"]
    assert pte["over lora"] > 2


@pytest.mark.parametrize("most", [0, 1, 7, 100])
def test_the_search_for_the_largest_batch(most):
    assert capacity.largest(lambda batch: batch <= most) == pytest.approx(most, rel=0.02)


def test_memory_is_counted_by_storage_and_while_it_lives():
    def job() -> None:
        x = torch.zeros(1000)
        y = x[10:]  # the same storage
        del x, y
        torch.zeros(500)

    assert peak_bytes(job, "cpu") == 4000
    with Peak() as peak:
        kept = torch.ones(10) + torch.ones(10)
    assert peak.now == kept.nbytes and peak.most == 120
    before = torch.ones(50)
    assert peak_bytes(lambda: before.view(5, 10).t(), "cpu") == 0
    x = torch.ones(8, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum().backward()) == 64


@pytest.mark.parametrize("arguments", ["--device cuda --clock cpu", "--device cuda"])
def test_what_cannot_be_measured_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "clock" in arguments)
    with pytest.raises(SystemExit):
        common.parse(common.options("x"), arguments.split())


def test_a_gpu_gets_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(common, "environment", lambda device: {"device": device})
    args = common.parse(common.options("x"), ["--device", "cuda"])
    assert (args.device, args.dtype, args.clock) == ("cuda:3", "bfloat16", "wall")


def test_the_commands_for_a_gpu_are_commands():
    """What `make bench-gpu` would run is understood by the scripts."""
    plan = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"-m benchmarks\.(\w+) (.*--device cuda.*)", plan)
    assert [name for name, _ in lines] == list(SMALL)
    for name, arguments in lines:
        words = [word if word != "cuda" else "cpu" for word in shlex.split(arguments)]
        args = importlib.import_module(f"benchmarks.{name}").arguments(words)
        assert args.shape == "qwen2.5-3b" and args.record
