"""The page of results says what the recorded results under docs/results/runs/ give."""

import json
from pathlib import Path

import pytest

from experiments.study import load_report, report

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "docs/results/runs"
LOAD = RUNS / "load"  # a folder for every number of digits and of steps
STUDIES = sorted(folder.name for folder in RUNS.iterdir() if folder != LOAD)
RECORDS = sorted(RUNS.glob("**/*-*.json"))
LOAD_STEPS = sorted({path.name.removeprefix("steps-") for path in LOAD.glob("digits-*/steps-*")})
PAGE = (ROOT / "docs/results.md").read_text().splitlines()
SHOWN = {"accuracy", "right_asked"}  # the page has the rest in its text


@pytest.mark.parametrize("study", STUDIES)
def test_every_row_of_the_records_is_on_the_page(study):
    found = report.read(RUNS / study)
    shown = [metric for metric in found if metric in SHOWN]
    assert shown
    for metric in shown:
        _, _, *rows = report.table(metric, found[metric]).splitlines()
        assert rows and not [row for row in rows if row not in PAGE]


@pytest.mark.parametrize("steps", LOAD_STEPS)
def test_the_load_curves_are_those_of_the_records(steps):
    written = load_report.text(load_report.curves(LOAD, int(steps)), {}, int(steps))
    assert (ROOT / f"docs/results/load_{steps}.md").read_text() == written
    assert not [line for line in written.splitlines() if line.startswith("|") and line not in PAGE]


@pytest.mark.parametrize("folder", sorted(LOAD.glob("digits-*/steps-*/ratio-*")), ids=lambda folder: folder.name)
def test_every_row_at_another_evict_ratio_is_on_the_page(folder):
    _, _, *rows = report.table("accuracy", report.read(folder / "results")["accuracy"]).splitlines()
    assert rows and not [row for row in rows if row not in PAGE]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: "-".join([*path.relative_to(RUNS).parts[:-1], path.stem]))
def test_a_record_says_where_it_comes_from(path):
    record = json.loads(path.read_text())
    arm, _, seed = path.stem.rpartition("-")
    assert arm and seed.isdigit()
    assert {"date", "commit", "command", "hardware", "threads", "torch"} <= set(record["environment"])
    assert path.stem in record["environment"]["command"]
