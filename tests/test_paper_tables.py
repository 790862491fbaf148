"""Rows and tables from runs written by hand, whose values are computed by hand in tests/paper_runs.py."""

import csv

import pytest

from experiments.paper import numbers, plan, results, tables
from experiments.paper.plan import Cell
from tests.paper_runs import (
    MATH,
    MODEL,
    STAND_IN,
    evaluation,
    table1_cells,
    write_evaluation,
    write_table1_runs,
    write_training,
)


@pytest.fixture
def rows(tmp_path):
    write_table1_runs(tmp_path)
    return results.rows("table1", table1_cells(tmp_path))


def by_name(rows):
    return {(row.keys["method"], row.keys["metric"]): row for row in rows}


def cells_of(text: str) -> dict[tuple, str]:
    """(method, kind, column) -> text of the Markdown tables in `text`."""
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    out, method = {}, ""
    for line in lines[1:]:
        assert len(line) == len(lines[0])
        method = line[0] or method
        out |= {(method, line[1], column): cell for column, cell in zip(lines[0][2:], line[2:], strict=True)}
    return out


def test_scores_are_percent_with_their_errors_and_counts(rows):
    pte = by_name(rows)["pte", "math500"]
    assert (pte.ours, pte.paper, pte.difference) == (37.5, 54.0, -16.5)
    assert pte.se == pytest.approx(100 * (0.6875 / 3 / 4) ** 0.5)
    assert (pte.problems, pte.samples, pte.at) == (4, 2, 3072)
    aime = by_name(rows)["pte", "aime24_pass16"]
    assert (aime.ours, aime.paper, aime.samples) == (50.0, 20.0, 16)
    assert aime.se == pytest.approx(100 * (1 / 3 / 4) ** 0.5)


def test_an_average_is_the_mean_of_its_scores_and_their_errors_add_in_squares(rows):
    average = by_name(rows)["pte", "avg"]
    assert average.ours == 43.75  # and not pulled down by the TFLOPs in the same line
    assert average.se == pytest.approx(18.75)  # sqrt(0.05729 + 0.08333) / 2 = 0.375 / 2
    assert (average.paper, average.folder, average.problems) == (30.1, None, None)


def test_an_average_waits_for_all_of_its_scores(rows):
    found = by_name(rows)
    assert found["baseline", "math500"].ours == 37.5
    assert found["baseline", "aime24_pass16"].ours is None
    assert found["baseline", "avg"].ours is None
    assert [row.keys["metric"] for row in results.missing(rows)] == ["aime24_pass16", "avg"]


def test_an_average_with_a_part_that_is_wholly_solved_has_an_interval(tmp_path):
    write_table1_runs(tmp_path)
    write_evaluation(tmp_path / "pte" / "aime24", [[1] * 16] * 4)
    found = by_name(results.rows("table1", table1_cells(tmp_path)))
    average, math = found["pte", "avg"], found["pte", "math500"]
    assert (average.ours, average.se) == (68.75, None)
    below = ((math.ours - math.low) ** 2 + 48.99**2) ** 0.5 / 2  # 4 of 4 have the interval [51.01, 100]
    assert average.low == pytest.approx(68.75 - below, abs=0.01)
    assert average.high == pytest.approx(68.75 + (math.high - math.ours) / 2)


def test_efficiency_comes_from_the_training(rows):
    row = by_name(rows)["pte", "attention_tflops_max"]
    assert (row.ours, row.paper, row.se, row.problems) == (3.25, 2.7, None, None)
    assert row.memory_of == "a card of 40 GB"


def test_a_training_counts_only_with_its_manifest(tmp_path):
    write_table1_runs(tmp_path)
    (tmp_path / "train" / "manifest.json").unlink()
    row = by_name(results.rows("table1", table1_cells(tmp_path)))["pte", "attention_tflops_max"]
    assert row.ours is None and row.folder


def test_a_rewritten_evaluation_is_read_again(tmp_path, rows):
    path = tmp_path / "pte" / "math500" / "records.jsonl"
    path.write_text(path.read_text().replace('"correct": false', '"correct": true'))
    again = by_name(results.rows("table1", table1_cells(tmp_path)))
    assert again["pte", "math500"].ours == 100.0


def test_averages_of_windows_and_of_benchmarks(tmp_path):
    write_evaluation(tmp_path / "a", MATH)
    write_evaluation(tmp_path / "b", [[1, 1], [1, 1], [0, 0], [0, 0]])
    base = {"dataset": "aime24", "model": MODEL, "method": "pte"}
    cells = [
        Cell({**base, "cache_window": "768"}, evaluation(tmp_path / "a"), "pass@1"),
        Cell({**base, "cache_window": "1024"}, evaluation(tmp_path / "b"), "pass@1"),
        Cell({**base, "dataset": "aime25", "cache_window": "768"}, evaluation(tmp_path / "b"), "pass@1"),
        Cell({**base, "cache_window": "avg"}, None, "avg"),
    ]
    assert results.rows("table2", cells)[-1].ours == (37.5 + 50) / 2


def test_one_problem_has_no_standard_error(tmp_path):
    write_evaluation(tmp_path / "one", [[1, 0]])
    keys = {"eviction_ratio": "0.10"}
    (row,) = results.rows("tableA1", [Cell(keys, evaluation(tmp_path / "one"), "pass@1")])
    assert (row.ours, row.se) == (50.0, None)


@pytest.mark.parametrize(
    "metric, complaint", [("pass@16", "2 samples per problem, too few for pass@16"), ("accuracy", "not a metric")]
)
def test_metrics_that_records_cannot_give_are_refused(tmp_path, metric, complaint):
    write_evaluation(tmp_path / "run", MATH)
    with pytest.raises(ValueError, match=complaint):
        results.rows("tableA1", [Cell({"eviction_ratio": "0.10"}, evaluation(tmp_path / "run"), metric)])


def test_efficiency_without_the_metric_is_refused(tmp_path):
    write_table1_runs(tmp_path)
    (tmp_path / "train" / "efficiency.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no attention_tflops_max"):
        results.rows("table1", table1_cells(tmp_path))


def test_an_average_has_a_key_that_says_so():
    keys = {"model": MODEL, "method": "pte", "metric": "math500"}
    with pytest.raises(ValueError, match="none of its keys is avg"):
        results.rows("table1", [Cell(keys, None, "avg")])


def test_the_table_has_the_papers_layout(rows):
    text = tables.markdown("table1", rows, {})
    cells = cells_of(text)
    assert cells["PTE", "paper", "MATH-500"] == "54.0"
    assert cells["PTE", "ours", "MATH-500"] == "37.5 ±23.9"
    assert cells["PTE", "diff", "MATH-500"] == "-16.5"
    assert cells["PTE", "diff", "AIME24 @16"] == "+30.0"
    assert cells["PTE", "ours", "TFLOPs max"] == "3.2 (6.5 †)"
    assert cells["PTE", "diff", "TFLOPs max"] == "+3.8"  # of the number by the paper's formula
    assert cells["Base", "ours", "AIME24 @16"] == "-" and cells["Base", "diff", "AIME24 @16"] == ""
    assert cells["Base", "paper", "TFLOPs max"] == cells["Base", "ours", "TFLOPs max"] == ""  # blank in the paper
    assert "Missing: 2 of 7 numbers of ours" in text
    assert "4 problems x 2 samples, 4 problems x 16 samples" in text
    assert "Memory of ours: a card of 40 GB." in text
    assert f"### {MODEL}" in text and "NOT THE PAPER" not in text


def test_efficiency_columns_come_first_as_in_the_paper(rows):
    (section,) = tables.sections("table1", rows)
    assert section.header == ["method", "", "TFLOPs max", "MATH-500", "AIME24 @16", "average"]


def test_small_differences_keep_one_decimal():
    (section,) = tables.sections("tableA1", [results.Row({"eviction_ratio": "0.10"}, "pass@1", 50.7, 50.66)])
    assert [line[-1] for line in section.lines] == ["50.7", "50.7", "-0.0"]


def test_a_stand_in_is_said_first(rows):
    lines = tables.markdown("table1", rows, STAND_IN).splitlines()
    assert lines[2] == "**NOT THE PAPER'S MODELS: ours is a <small> model. Its numbers & the paper's differ.**"


def test_slips_are_marked_and_said():
    text = tables.markdown("tableA1", results.rows("tableA1", plan.cells("tableA1", "paper")), {})
    assert "| 50.8 [1] | 51.4 " in text
    assert "- [1] Figures 4a, 4b and A1 have 50.4" in text
    assert all(f"- {line}" in text for line in numbers.general_slips("tableA1"))


def test_every_item_of_the_plan_has_a_layout_and_can_be_written_empty():
    for item in plan.ITEMS:
        found = results.rows(item, plan.cells(item, "paper"))
        text = tables.markdown(item, found, {})
        assert f"Missing: {len(found)} of {len(found)} numbers" in text
        for section in tables.sections(item, found):
            assert all(len(line) == len(section.header) for line in section.lines)


def test_no_cell_is_lost_in_the_layout():
    for item in plan.ITEMS:
        found = results.rows(item, plan.cells(item, "paper"))
        written = sum(
            cell == "-" for section in tables.sections(item, found) for line in section.lines for cell in line
        )
        assert written == len(found)


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (None, 1, "-"),
        (20.0, 2, "20.0"),
        (25.57, 2, "25.57"),
        (40.5333, 2, "40.53"),
        (0.00042, 1, "0.00042"),
        (0.0, 1, "0.0"),
    ],
)
def test_numbers_as_text(value, digits, text):
    assert tables.number(value, digits) == text


def test_the_csv_keeps_every_cell_in_full_precision(tmp_path, rows):
    tables.write_csv(tmp_path / "table1.csv", "table1", rows)
    with (tmp_path / "table1.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert {key: line[key] for key in row.keys} == row.keys
        assert line["measure"] == row.metric
        for name in ("paper", "ours", "difference", "se", "problems", "samples"):
            value = getattr(row, name)
            assert line[name] == "" if value is None else float(line[name]) == value


def test_runs_of_the_plans_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = next(cell for cell in plan.cells("table1", "tiny") if cell.metric == "gpu_mem_peak_pct")
    write_training(tmp_path / cell.source.folder)
    found = results.rows("table1", plan.cells("table1", "tiny"))
    assert [row.keys for row in found if row.ours == 40.0] == [cell.keys]
