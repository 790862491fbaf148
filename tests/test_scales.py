"""Filters, names and costs of the paper's runs: plain Python, nothing is trained."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from experiments.paper.cost import CARDS, PROBLEMS, SEGMENT, cost, setting, shape_of
from experiments.paper.filters import ALL, BENCHMARKS, METHODS, filters
from experiments.paper.plan import ITEMS, EvaluationRun, TrainingRun, needed, short_name
from experiments.paper.scales import NIGHT_MODEL, SCALES, night
from experiments.paper.show import main, report
from experiments.paper.targets import rules
from pte_trl.evaluation.benchmarks import TESTED
from pte_trl.replay import segment_run
from tests.test_plan import ROOT, TABLE1, plan_of


def runs_of(scale: str) -> list:
    return list(dict.fromkeys(run for item in ITEMS for run in needed(item, scale)))


# ---- filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, given, kept",
    [
        ("paper", {"models": "qwen3b"}, (3, 24)),
        ("paper", {"models": "Qwen2.5-3B-Instruct, llama8b"}, (6, 48)),
        ("paper", {"methods": "lora_c pte"}, (6, 36)),
        ("paper", {"methods": "baseline"}, (0, 18)),
        ("paper", {"benchmarks": "math500,aime24", "methods": "pte", "models": "qwen7b"}, (1, 2)),
        ("night", {"seeds": "43"}, (3, 24)),  # the baseline's evaluations have no seed
        ("night", {"seeds": "42 44", "methods": "pte", "benchmarks": "amc23"}, (2, 2)),
        ("tiny", {"benchmarks": "math500"}, (3, 4)),
        ("tiny", {"models": "tiny", "methods": "lora"}, (1, 6)),
    ],
)
def test_a_filter_leaves_runs_out_and_changes_none(scale, given, kept):
    every, found = needed("table1", scale), needed("table1", scale, filters(SCALES[scale], **given))
    trainings = sum(isinstance(run, TrainingRun) for run in found)
    assert (trainings, len(found) - trainings) == kept
    assert set(found) <= set(every)


BAD = [
    ("paper", "models", "tiny", "MODELS=tiny: not of SCALE=paper; allowed are qwen3b, qwen7b, llama8b"),
    ("paper", "methods", "vanilla", "METHODS=vanilla: not of SCALE=paper; allowed are baseline, lora, lora_c, pte"),
    ("tiny", "benchmarks", "amc23 gsm8k", f"BENCHMARKS=gsm8k: not of SCALE=tiny; allowed are {', '.join(BENCHMARKS)}"),
    ("night", "seeds", "42,45", "SEEDS=45: not of SCALE=night; allowed are 42, 43, 44"),
    ("paper", "seeds", "43", "SEEDS=43: not of SCALE=paper; allowed are none, its runs have the seed of their recipe"),
]


@pytest.mark.parametrize("scale, key, value, message", BAD)
def test_a_bad_value_is_one_sentence(scale, key, value, message, capsys):
    with pytest.raises(ValueError) as error:
        filters(SCALES[scale], **{key: value})
    assert str(error.value) == message
    with pytest.raises(SystemExit) as end:
        main(["table1", "--scale", scale, f"--{key}", value])
    assert end.value.code == f"error: {message}"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["table9"], "plan-table9: there is no such table or figure; allowed are all, table1"),
        (
            ["table1", "--scale", "day"],
            "SCALE=day: there is no such scale; allowed are paper, night, tiny",
        ),
        (["table1", "--card", "T4"], "CARD=T4: not known; allowed are A100, H100, H200, CPU"),
    ],
)
def test_so_are_the_other_variables(argv, message):
    with pytest.raises(SystemExit, match=message):
        main(argv)


def test_make_takes_the_filters_of_every_target(tmp_path):
    done = plan_of("reproduce-all", "paper", tmp_path, "MODELS=qwen7b", "METHODS=lora_c pte", "BENCHMARKS=math500")
    assert done.returncode == 0, done.stderr
    launched = [line for line in done.stdout.splitlines() if "recipes/" in line]
    assert len(launched) == 12  # two trainings, and figure 3's five windows of both; Table 1's is one of them
    assert all("recipes/qwen7b.yaml" in line and "--method lora " not in line for line in launched)
    assert done.stdout.count("experiments.paper.render") == 2  # nothing is left of the others
    alone = plan_of("reproduce-figureA1", "paper", tmp_path, "MODELS=qwen7b")
    assert alone.returncode != 0 and 'figureA1: MODELS="qwen7b" leaves none of its runs' in alone.stderr
    for target in ("reproduce-table1", "plan-table1", "train-qwen3b-pte"):
        wrong = plan_of(target, "paper", tmp_path, "METHODS=sft", run=target.startswith("plan"))
        assert wrong.returncode != 0 and "METHODS=sft: not of SCALE=paper" in wrong.stderr


# ---- one run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_has_a_name_of_its_own_that_is_a_target(scale):
    names = [short_name(run, scale) for run in runs_of(scale)]
    assert len(set(names)) == len(names)
    # Filters leave no name out.
    targets = {rule.target for rule in rules(scale, filters(SCALES[scale], methods="pte"))}
    assert set(names) <= targets


@pytest.mark.parametrize(
    "scale, name, words",
    [
        ("paper", "train-qwen3b-pte-global_16", "--num_global_tokens 16"),
        ("paper", "evaluate-llama8b-baseline-math500-1024-length65536", "--max_new_tokens 65536"),
        ("paper", "evaluate-qwen3b-baseline-aime24-1536", "--max_new_tokens 6144"),
        ("night", "train-Qwen2.5-1.5B-Instruct-lora-seed44", "--seed 44"),
        ("tiny", "evaluate-tiny-baseline-olympiadbench-112", "--benchmarks tiny_olympiadbench"),
        ("paper", "outputs/paper/train/qwen3b/pte/manifest.json", "--output_dir outputs/paper/train/qwen3b/pte "),
    ],
)
def test_one_run_by_its_name(scale, name, words, tmp_path):
    done = plan_of(name, scale, tmp_path)
    launched = [line for line in done.stdout.splitlines() if "recipes/" in line]
    assert len(launched) == 1 and words in launched[0], done.stderr


def test_a_name_that_is_none_says_where_they_are(tmp_path):
    for target in ("train-qwen3b-pte-global_17", "evaluate-qwen3b-pte", "reproduce-table9"):
        done = plan_of(target, "paper", tmp_path, run=True)
        assert done.returncode != 0 and f"error: there is no target {target}" in done.stderr


# ---- the night's model ----------------------------------------------------------------------------------------------


def test_another_model_for_the_night_has_another_folder(tmp_path):
    assert night(None).model == NIGHT_MODEL and night("/models/Qwen2.5-1.5B-Instruct").folder == "outputs/night"
    other = night("/models/Small-Model")
    assert other.folder == "outputs/night-Small-Model" and other.caption()["model"].startswith("Small-Model in")
    (tmp_path / "venv").mkdir()
    ready = f"READY={tmp_path}/venv"
    done = plan_of("reproduce-tableA1", "night", tmp_path, "NIGHT_MODEL=org/Small-Model", "SEEDS=42", ready)
    assert done.stdout.count("--model_name_or_path org/Small-Model ") == 6
    assert "--output outputs/night-Small-Model/results" in done.stdout


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_shapes_and_benchmarks_are_those_of_the_package():
    billions = {"qwen3b": 3.09, "qwen7b": 7.61, "llama8b": 8.03, "Qwen2.5-1.5B-Instruct": 1.54}
    for model, published in billions.items():
        assert shape_of(model).parameters / 1e9 == pytest.approx(published, abs=0.006)
    assert shape_of("unheard of") is None
    assert SEGMENT == segment_run.LONGEST
    assert {name: TESTED[name].rows for name in BENCHMARKS} == PROBLEMS


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_has_its_cost(scale):
    at = SCALES[scale]
    for run in runs_of(scale):
        found = cost(run, at)
        assert found.tokens > 0 and found.hours > 0 and found.disk > 0
        if isinstance(run, TrainingRun):
            steps, length = (int(setting(run, at, key)) for key in ("max_steps", "max_completion_length"))
            assert found.tokens == steps * at.completions * length
        if at.gpus == 1 and at.card != "CPU":
            assert cost(run, at, "A100").hours > found.hours


def test_the_night_makes_table_1_in_ten_hours_of_one_h100():
    at = SCALES["night"]
    assert (at.gpus, at.card) == (1, "H100") and len(at.seeds) > 1
    assert sum(cost(run, at).hours for run in needed("table1", "night")) < 10


def test_the_papers_table_1_is_billions_of_tokens():
    tokens = sum(cost(run, SCALES["paper"]).tokens for run in needed("table1", "paper"))
    assert tokens == 9 * 300 * 512 * 3072 + 12 * (1486 * 5 * 3072 + 60 * 16 * 6144)


def write_step(folder, seconds: float, processes: int, about: str = "manifest.json") -> None:
    """What a run logs of its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    log = [{"step": n, "step_time": seconds, "num_tokens": 1000.0 * n} for n in (1, 2)] + [{"train_runtime": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / about).write_text(json.dumps({"processes": processes}))


def test_a_measured_step_takes_the_place_of_the_estimate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "outputs/night/train/Qwen2.5-1.5B-Instruct"
    write_step(trained / "pte-seed43", 288.0, 2)  # 50 steps of 288 s on two GPUs: 8 hours
    write_step(trained / "lora-seed42/checkpoint-8", 900.0, 1, "complete.json")
    write_step(trained / "lora-seed42/checkpoint-16", 576.0, 1, "complete.json")
    (trained / "lora_c-seed42/checkpoint-8").mkdir(parents=True)
    lines = {line.split()[0]: line for line in report("figure6", "night", ALL).splitlines() if "-seed" in line}
    name = "train-Qwen2.5-1.5B-Instruct"
    columns = {key: lines[f"{name}-{key}"].split()[1:] for key in ("pte-seed43", "lora-seed42")}
    assert columns["pte-seed43"][:5] == ["done", "50", "k", "8", "measured"]
    assert columns["lora-seed42"][:5] == ["started", "50", "k", "8", "measured"]  # the newest checkpoint's
    assert "to do" in lines[f"{name}-pte-seed44"] and "8  measured" in lines[f"{name}-pte-seed44"]
    assert "started" in lines[f"{name}-lora_c-seed42"] and "estimated" in lines[f"{name}-lora_c-seed42"]
    text = report("figure6", "night", ALL)
    assert "all: 9 trainings and 10 evaluations" in text and "to do: 8 trainings and 10 evaluations" in text
    assert "Measured: the median step" in text


def test_the_plan_of_everything_counts_a_shared_run_once():
    text = report("all", "paper", ALL)
    assert all(f"reproduce-{item} " in text for item in ITEMS)
    assert "each run once       0 of 18 done  0 of 364 done" in text
    assert "Estimated: A100, 312 TFLOP/s" in text and "The paper states 19 minutes a step" in text


def test_make_prints_the_plan_without_an_environment(tmp_path):
    """`-S` leaves site-packages out. Every run is listed with what to type."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = plan_of("plan-table1", "paper", tmp_path, f"PYTHON={python}", "CARD=H100", run=True)
    assert done.returncode == 0, done.stderr
    for run in needed("table1", "paper"):
        assert f"\n{short_name(run, 'paper')} " in done.stdout
    assert "Estimated: H100" in done.stdout and "9 trainings and 72 evaluations" in done.stdout


def test_the_page_states_these_costs():
    """docs/reproduce.md rounds them to one or two digits; the tokens are exact."""
    page = (ROOT / "docs/reproduce.md").read_text()
    rows = {
        cells[1].strip(): cells[2:5] for cells in (line.split("|") for line in page.splitlines()) if len(cells) == 6
    }
    scales = [SCALES[name] for name in ("paper", "night", "tiny")]
    for row, runs in (("Table 1", lambda at: needed("table1", at.name)), ("everything", lambda at: runs_of(at.name))):
        stated = [re.search(r"[\d,.]+|half", cell)[0] for cell in rows[f"{row}: cost, estimated"]]
        hours = [0.5 if text == "half" else float(text.replace(",", "")) for text in stated]
        assert hours == pytest.approx([sum(cost(run, at).hours for run in runs(at)) for at in scales], rel=0.1)
    for cell, at in zip(rows["Table 1: trainings, evaluations"], scales, strict=True):
        assert tuple(map(int, cell.split(","))) == TABLE1[at.name]


def test_help_lists_them():
    shown = subprocess.run([shutil.which("make"), "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"\n{target} " in shown for target in ("plan-%", "reproduce-%", "train-%", "evaluate-%", "report"))


def test_cards_and_methods_are_known():
    assert {scale.card for scale in SCALES.values()} <= set(CARDS)
    assert {run.run.partition("-")[0] for run in runs_of("paper")} == set(METHODS)
    assert {run.benchmark for run in runs_of("paper") if isinstance(run, EvaluationRun)} == set(BENCHMARKS)
