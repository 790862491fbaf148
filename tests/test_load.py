"""The load curves: which runs there are, that they work, and that the report says what the result files say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.rules import Run
from experiments.study import load_report, show
from experiments.study.arms import LOAD_ARMS
from experiments.study.load import LONGEST, RATIO_ARMS, RATIOS, WINDOWS, load
from experiments.study.recall import LONGEST as LONGEST_COUNTDOWN
from experiments.study.recall import countdown
from experiments.study.runs import SEEDS, Study
from pte_trl.cache.schedule import Schedule
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent


def test_a_thought_of_ten_digits_fits():
    for window in WINDOWS:
        length = countdown(Schedule(int(window)), 10)
        assert length <= LONGEST_COUNTDOWN and 10 + length + 2 * 10 + 1 <= LONGEST


def test_every_arm_has_its_runs():
    study = load()
    targets = {run.target for run in study.runs}
    for digits in (4, 6, 8, 10):
        for arm in LOAD_ARMS:
            for seed in SEEDS:
                assert f"study-load-digits-{digits}-steps-400-{arm.name}-{seed}" in targets
            for ratio in RATIOS:
                assert f"study-load-digits-{digits}-steps-400-ratio-{ratio}-mlp-{seed}" in targets
    measured = (len(LOAD_ARMS) + len(RATIOS) * len(RATIO_ARMS)) * len(SEEDS)
    assert len(study.results) == 4 * (measured + 1)
    trainings = [run for run in study.runs if show.steps_of(run) == 400]
    assert trainings and all(" --window 6 16 " in " ".join(run.commands[0]) for run in trainings)


def plan(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.study.plan"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_filters_leave_runs_out_and_change_none():
    everything, part = plan().stdout, plan(ARMS="sum delta", DIGITS="8", SEEDS="1").stdout
    (table,) = [line for line in part.splitlines() if line.startswith("docs/results/load_400.md:")]
    folder = "outputs/study/load/digits-8"
    assert set(table.split()[1:]) == {
        f"{folder}/results/base-0.json",
        *(f"{folder}/steps-400/results/{arm}-1.json" for arm in ("sum", "delta")),
    }
    rule = f"{folder}/steps-400/sum-1/manifest.json:"
    (one,), (other,) = ([r for r in text.split("\n\n") if r.startswith(rule)] for text in (everything, part))
    assert one == other
    assert "ARMS=sum delta are none of its arms" in part  # of the other studies
    for key, value, allowed in (("DIGITS", "11", "from 1 to 10"), ("STEPS", "few", "one number above 0")):
        refused = plan(**{key: value})
        assert refused.returncode == 1 and f"error: {key}={value}" in refused.stderr and allowed in refused.stderr


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_report_says_what_the_files_say(tmp_path):
    for digits, base in ((4, 1.0), (10, 0.9)):
        folder = tmp_path / f"digits-{digits}"
        write(folder / "results/base-0.json", {"values": {"8": 0.1, "full": base}})
        for seed, value in enumerate((0.5, 0.75)):
            write(folder / f"steps-9/results/sum-{seed}.json", {"values": {"8": value / digits, "full": 1.0}})
            log = [{"step": 5}, {"step": 9, "train_runtime": 18.0 * (seed + 1)}]
            write(folder / f"steps-9/sum-{seed}/trainer_state.json", {"global_step": 9, "log_history": log})
        write(folder / "steps-9/results/recursive-0.json", {"values": {"8": 0.1, "full": 1.0}})
        log = [{"step": 9, "train_runtime": 9.0}]
        write(folder / "steps-9/recursive-0/trainer_state.json", {"global_step": 9, "log_history": log})
        write(folder / "steps-7/results/delta-0.json", {"values": {"8": 0.3, "full": 1.0}})  # of other steps
    found, costs = load_report.curves(tmp_path, 9), load_report.seconds(tmp_path, 9)
    assert list(found) == [4, 10] and found[10]["sum"]["8"].values == (0.05, 0.075)
    text = load_report.text(found, costs, 9)
    assert "| sum | 4 | 2 | 0.156 ± 0.044 | 1.000 ± 0.000 |" in text and "delta" not in text
    assert "| base | 10 | 1 | 0.100 | 0.900 |" in text and "Chance is 0.10." in text
    assert "| sum | 3.000 ± 1.414 | 3.000 ± 1.414 | 3.00 |" in text
    load_report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no results of 8 steps"):
        load_report.curves(tmp_path, 8)


def test_a_plan_says_what_is_left_and_how_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study("trial")
    for seed in "01":
        run = f"{study.folder}/sum-{seed}"
        study.runs.append(Run(f"{run}/manifest.json", ("other.jsonl",), (("train", "--max_steps", "30"),)))
        study.measure(f"sum-{seed}", (f"{run}/manifest.json",), ("measure",))
    assert "2 of them trainings, 0 minutes and 2 of unknown length" in show.report(study)
    log = [{"step": 10, "train_runtime": 40.0}]
    write(tmp_path / study.folder / "sum-0/trainer_state.json", {"global_step": 10, "log_history": log})
    write(tmp_path / study.folder / "sum-0/manifest.json", {})
    lines = show.report(study).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["done", "2.0", "outputs/study/trial/sum-0"],
        ["to", "do", "outputs/study/trial/results/sum-0.json"],
        ["to", "do", "2.0", "outputs/study/trial/sum-1"],
    ]
    assert "left: 3 of 4 runs; 1 of them trainings, 2 minutes" in lines


@pytest.fixture
def make(tmp_path):
    """make in a checkout with outputs of its own: one arm, one seed, ten digits, one step."""
    for name in ("Makefile", "experiments", "pte_trl", "recipes", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ready").touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    variables = [f"PYTHON={sys.executable}", f"READY={tmp_path}/ready", "DIGITS=10", "SEEDS=0", "ARMS=sum"]
    variables += ["STEPS=1", "LOAD_BASE_STEPS=1", "RESULTS=outputs/trial"]

    def run(*command: str) -> str:
        command = ["make", *command, *variables]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_a_run_has_a_name_and_brings_what_it_needs(make):
    lines = make("-n", "study-load-digits-10-steps-1-sum-0").splitlines()
    programs = ["experiments.study.recall", "recipes/distill_pte.py", "experiments.study.evaluate"]
    assert [program for line in lines for program in programs if program in line] == programs
    lines = make("-n", "study-load").splitlines()
    assert "load_report outputs/study/load --steps 1 --output outputs/trial/load_1" in lines[-1]
    assert "left: 4 of 4 runs; 1 of them trainings" in make("plan-study-load")


@pytest.mark.thorough  # ten seconds
def test_a_run_from_its_name_to_the_table(make, tmp_path):
    """What is done is not done again."""
    client = f"PY={python()}"
    make("study-load-digits-10-steps-1-sum-0", client)
    out = make("study-load", client)
    assert "distill_pte" not in out and (tmp_path / "outputs/trial/load_1.md").read_text() in out
    assert "| seconds a step | 10 digits |" in out and "| sum | 10 | 1 |" in out
    assert (tmp_path / "outputs/trial/load_1.png").exists()
    assert "distill_pte" not in make("study-load", client)
    assert "left: 0 of 4 runs; 0 of them trainings, 0 minutes" in make("plan-study-load")
