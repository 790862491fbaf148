"""PTE minus the others, paired by problem, over seeds and over the parts of an average; values by hand."""

import csv
from dataclasses import fields

import pytest

from experiments.paper import plan, results, tables
from experiments.paper.differences import differences
from experiments.paper.plan import Cell
from tests.paper_runs import AIME, MATH, MODEL, Seeded, evaluation, write_evaluation

LORA_C = [[1, 0], [0, 0], [0, 0], [0, 0]]  # MATH minus it: 0.5, 0.5, 0, 0; mean 25 %, squared error 0.25 / 3 / 4


def keys(method: str, metric: str = "math500") -> dict[str, str]:
    return {"model": MODEL, "method": method, "metric": metric}


def cell(root, method: str, metric: str = "math500") -> Cell:
    aime = metric.endswith("_pass16")
    source = evaluation(root / method / metric, benchmark=metric.removesuffix("_pass16"))
    return Cell(keys(method, metric), source, "pass@16" if aime else "pass@1")


@pytest.fixture
def cells(tmp_path):
    """PTE and LoRA with MATH and AIME, LoRA_c with MATH alone."""
    for method, verdicts in {"pte": MATH, "lora_c": LORA_C, "lora": MATH}.items():
        write_evaluation(tmp_path / method / "math500", verdicts)
    for method in ("pte", "lora"):
        write_evaluation(tmp_path / method / "aime24_pass16", AIME)
    found = []
    for method in ("lora", "lora_c", "pte"):
        found += [
            cell(tmp_path, method),
            cell(tmp_path, method, "aime24_pass16"),
            Cell(keys(method, "avg"), None, "avg"),
        ]
    return found


def by_name(rows):
    return {(one.other, one.keys["metric"]): one for one in differences(rows)}


def seeded(root, method: str, seed: int) -> Cell:
    plain = evaluation(root / f"{method}-{seed}")
    values = {one.name: getattr(plain, one.name) for one in fields(plain) if one.name != "seed"}
    return Cell(keys(method), Seeded(**values, seed=seed), "pass@1")


def test_a_difference_has_the_error_of_the_problems_differences(cells):
    one = by_name(results.rows("table1", cells))["lora_c", "math500"]
    assert (one.ours, one.problems, one.seeds, one.paper) == (25.0, 4, 1, 4.0)
    assert one.se == pytest.approx(100 * (0.25 / 3 / 4) ** 0.5)


def test_a_difference_waits_for_both(cells):
    found = by_name(results.rows("table1", cells))
    assert found["lora_c", "aime24_pass16"].ours is None
    assert found["lora_c", "aime24_pass16"].paper == pytest.approx(3.3)


def test_an_average_is_of_the_parts_that_both_have_on_both_sides(cells):
    found = by_name(results.rows("table1", cells))
    assert (found["lora_c", "avg"].ours, found["lora_c", "avg"].parts) == (25.0, (1, 2))
    assert found["lora_c", "avg"].paper == 4.0  # MATH-500 alone, and not the printed average's 4.5
    assert (found["lora", "avg"].ours, found["lora", "avg"].parts) == (0.0, (2, 2))
    assert found["lora", "avg"].paper == pytest.approx(1.9)


def test_the_table_has_a_section_of_them(cells):
    main, paired = tables.sections("table1", results.rows("table1", cells))
    assert paired.title == f"{MODEL}, PTE minus the others, paired by problem"
    assert paired.header == ["method", "", "MATH-500", "AIME24 @16", "average"]
    assert paired.lines == [
        ["PTE - LoRA_c", "paper", "+4.0", "+3.3", "+4.0"],
        ["", "ours", "+25.0 ±14.4", "-", "+25.0 ±14.4 (1 of 2)"],
        ["PTE - LoRA", "paper", "+0.8", "+0.0", "+1.9"],
        ["", "ours", "+0.0 (no problem differs)", "+0.0 (no problem differs)", "+0.0 (no problem differs)"],
    ]
    assert main.lines[-1] == ["", "n", "4 x 2", "4 x 16", ""]


def test_the_csv_has_them_beside_ptes_numbers(tmp_path, cells):
    rows = results.rows("table1", cells)
    tables.write_csv(tmp_path / "table1.csv", "table1", rows)
    with (tmp_path / "table1.csv").open(newline="") as file:
        lines = {(line["method"], line["metric"]): line for line in csv.DictReader(file)}
    pte = lines["pte", "math500"]
    assert (pte["minus_lora_c"], pte["minus_lora"]) == ("25.0", "0.0")
    assert float(pte["minus_lora_c_se"]) == pytest.approx(14.4338, abs=1e-4)
    assert lines["lora", "math500"]["minus_lora_c"] == ""


def test_seeds_are_paired_and_in_the_error(tmp_path):
    verdicts = {"pte": ([[1], [1]], [[1], [0]]), "lora_c": ([[0], [1]], [[0], [0]])}
    for method, runs in verdicts.items():
        for seed, run in zip((42, 43), runs, strict=True):
            write_evaluation(tmp_path / f"{method}-{seed}", run)
    rows = results.rows("table1", [seeded(tmp_path, method, seed) for method in verdicts for seed in (42, 43)])
    assert [(row.ours, row.seeds, row.planned, row.problems) for row in rows] == [(75.0, 2, 2, 2), (25.0, 2, 2, 2)]
    # By seed x problem PTE has 1 1 / 1 0, LoRA_c 0 1 / 0 0: alone errors of 25, but of each problem's difference none.
    assert [row.se for row in rows] == pytest.approx([25.0, 25.0])
    (one,) = differences(rows)
    assert (one.ours, one.seeds) == (50.0, 2)
    assert one.se == pytest.approx(50.0)  # 1 and 0 in both seeds: all of it lies between the problems


def test_seeds_that_one_side_lacks_are_left_out_and_partial_ones_named(tmp_path):
    for name, run in {"pte-42": [[1], [0]], "pte-43": [[1], [1]], "lora_c-42": [[0], [0]]}.items():
        write_evaluation(tmp_path / name, run)
    cells = [seeded(tmp_path, method, seed) for method in ("pte", "lora_c") for seed in (42, 43)]
    rows = results.rows("table1", cells)
    (one,) = differences(rows)
    assert (one.ours, one.seeds) == (50.0, 1)
    text = tables.markdown("table1", rows, {})
    assert "Seeds: 1 numbers are means of 1 of 2 trainings" in text
    assert "| 2 x 1 x 2 seeds / 2 x 1 |" in text


def test_runs_with_other_problems_or_other_seeds_have_no_difference(tmp_path):
    write_evaluation(tmp_path / "pte-42", [[1], [0]])
    write_evaluation(tmp_path / "lora_c-43", [[0], [0]])
    rows = results.rows("table1", [seeded(tmp_path, "pte", 42), seeded(tmp_path, "lora_c", 43)])
    assert [one.ours for one in differences(rows)] == [None]
    assert len(tables.sections("table1", rows)) == 1


@pytest.mark.parametrize(
    "item, count", {"table1": 3 * 2 * 7, "table2": 2 * 2 * 3 * 4, "table3": 2, "figure5": 12, "tableA1": 0}.items()
)
def test_every_score_of_pte_is_compared_with_both(item, count):
    found = differences(results.rows(item, plan.cells(item, "paper")))
    assert len(found) == count and all(one.paper is not None and one.ours is None for one in found)


def test_table_3_compares_equal_lengths_only():
    found = differences(results.rows("table3", plan.cells("table3", "paper")))
    assert {one.keys["generation_length"] for one in found} == {"3072", "6144"}
