"""`make gpu-check`: a step that fails, hangs or does not fit costs only itself, and the report says what happened."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import common, exact, gpu_check, gpu_report, profile_decode
from benchmarks.gpu_check import STEPS, Step
from tests.forked import python

ROOT = common.ROOT
TINY = "--batch 2 --prompt 4 --new-tokens 8 --window 4 --turns 1 --arms lora_c --roofline"


def step(name: str, module: str = "rollout", full: str = TINY, **changes) -> Step:
    return Step(name, f"What does {name} do?", module, full, full, **{"takes": 0, "limit": 300} | changes)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs steps of the test's with `--device cpu`; returns their results and the report."""
    monkeypatch.setattr(sys, "executable", python())

    def run(*steps: Step, minutes: float = 20) -> tuple[list, str]:
        args = gpu_check.arguments(["--device", "cpu", "--out", str(tmp_path), "--minutes", str(minutes)])
        results = gpu_check.check(list(steps), args)
        return results, (tmp_path / "gpu_check.md").read_text()

    return run


def test_a_step_that_fails_or_hangs_or_does_not_fit_costs_only_itself(check, tmp_path):
    hangs = "--batch 1 --prompt 4 --new-tokens 1000000 --window 4 --turns 1 --arms lora_c"
    results, report = check(
        step("refused", full=f"{TINY} --batch none"),
        step("hangs", full=hangs, limit=5),
        step("absent", needs=("not_a_package",)),
        step("works", environment={"SOME_VARIABLE": "1"}),
        step("long", takes=10_000),
    )
    status = {result.name: result.status for result in results}
    assert status["works"] == "ok"
    assert status["refused"] == "failed, exit status 2" and status["hangs"].startswith("stopped after ")
    assert status["absent"] == "left out, not installed: not_a_package"
    assert status["long"].endswith("s were left and it takes 10000")
    assert [result.failed for result in results] == [True, True, False, False, False]
    assert (
        "`refused`: failed, exit status 2: `rollout.py: error: argument --batch: invalid int value: 'none'" in report
    )
    assert "SOME_VARIABLE=1 python -m benchmarks.rollout" in report and " of the roofline" in report
    ((row,),) = [run["rows"] for run in json.loads((tmp_path / "rollout.json").read_text())]
    assert row["arm"] == "lora_c" and {path.name for path in tmp_path.iterdir()} == {"gpu_check.md", "rollout.json"}


def test_the_report_is_there_after_every_step(check, tmp_path, monkeypatch):
    written, write = [], gpu_report.write
    monkeypatch.setattr(
        gpu_check, "write", lambda *of: write(*of) or written.append((tmp_path / "gpu_check.md").read_text())
    )
    check(step("one", needs=("not_a_package",)), step("two", takes=10_000))
    assert "not run yet: two" in written[0] and "not run yet" not in written[1] and len(written) == 2


@pytest.mark.parametrize("of", STEPS, ids=lambda of: of.name)
def test_every_command_is_understood_by_its_script(of):
    assert of.takes < of.limit
    for small in (False, True):
        module, *words = of.argv(small, "cpu", Path("out"))
        args = import_module(module).arguments(words)
        assert args.device == "cpu" and (not of.records or args.records == Path("out"))


def test_all_limits_together_are_the_minutes_that_are_promised():
    assert sum(of.limit for of in STEPS) <= 20 * 60
    plan = subprocess.run(["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (words,) = (shlex.split(line)[3:] for line in plan.splitlines() if "benchmarks.gpu_check" in line)
    args = gpu_check.arguments(words)
    assert args.steps == [of.name for of in STEPS] and args.minutes == 20 and args.device == "cuda"


def test_a_cell_that_is_wrong_is_named(monkeypatch, tmp_path):
    """The engine's log-probs are changed in the fourth decimal."""
    sample = exact.rollout

    def shifted(*of, reference=False, **knobs):
        found = sample(*of, reference=reference, **knobs)
        found.logprobs = [[x + 5e-4 * (not reference) for x in row] for row in found.logprobs]
        return found

    monkeypatch.setattr(exact, "rollout", shifted)
    with pytest.raises(SystemExit, match=re.escape("engine > 0.0001, replay > 0.0001")):
        exact.main(["--dtypes", "float32", "--cells", "1"])


def test_verdicts():
    right = {"tokens": "3/3", "engine": 1e-6, "replay": 1e-6, "segments": 1e-6, "gradients": 1e-6}
    assert exact.verdict(right, "float32") == "ok"
    assert exact.verdict(right | {"tokens": "2/3"}, "float32") == "tokens differ"
    assert exact.verdict(right | {"tokens": "2/3"}, "bfloat16") == "ok"
    assert exact.verdict(right | {"replay": float("nan")}, "bfloat16") == "replay > 0.1"


def test_the_profile_counts_the_steps_it_is_told(monkeypatch, capsys):
    profile_decode.main(shlex.split("--batch 2 --prompt 4 --window 64 --steps 3 --top 5 --arms bare"))
    (header, values) = capsys.readouterr().out.strip().splitlines()[-2:]
    assert header.startswith("arm") and float(values.split()[-1]) > 10
    with pytest.raises(SystemExit):
        profile_decode.arguments(["--window", "64", "--steps", "12"])


def test_what_a_step_prints_cannot_end_its_block():
    shown = gpu_report.printed("```\r50%\r100%\nUSDT:x\n" + 250 * "a", 60)
    assert shown.split("\n") == ["```", "100%", 200 * "a", 50 * "a", "```"]
    assert gpu_report.printed("a\nb\nc", 2).split("\n") == ["```", "(1 lines before)", "b", "c", "```"]
