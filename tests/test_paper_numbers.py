"""The paper's numbers as shipped: complete, consistent where the paper is, and every slip on a cell that exists."""

import csv

import pytest

from experiments.paper import numbers, plan

# Counted in the paper.
COUNTS = {
    **{"table1": 111, "table2": 96, "table3": 18, "tableA1": 5},
    **{"figure3a": 100, "figure3b": 100, "figure3": 200, "figureA1": 100, "figure4a": 34, "figure4b": 25},
    **{"figure5": 24, "figure6": 32, "figure6_long": 4},
}
MODELS = {"figure3a": "Qwen2.5-7B-Instruct", "figure3b": "DeepSeek-R1-Distill-Llama-8B"}
BENCHMARKS = ("math500", "olympiadbench", "minerva_math", "amc23")
AIME = ("aime24_pass16", "aime25_pass16")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("item", COUNTS)
def test_every_number_is_there_once_under_its_keys(item):
    rows = numbers.load(item)
    names = {tuple(row[key] for key in numbers.KEYS[item]) for row in rows}
    assert len(rows) == len(names) == COUNTS[item]
    assert all(set(row) == {*numbers.KEYS[item], "value"} for row in rows)


def test_counts_cover_every_item():
    assert set(COUNTS) == set(numbers.KEYS) >= set(plan.ITEMS)


def test_the_files_hold_keys_and_values_only():
    files = {path.stem for path in numbers.DATA.glob("*.csv")}
    assert files == set(numbers.KEYS) - {"figure3"}
    for item in files:
        with (numbers.DATA / f"{item}.csv").open() as file:
            assert next(csv.reader(file)) == [*numbers.KEYS[item], "value"]


# Section 4.2 quotes three of them; lora_c's is not quoted.
@pytest.mark.parametrize("method, grand", {"pte": 39.37, "lora": 32.99, "baseline": 30.31, "lora_c": 34.44}.items())
def test_grand_means_over_three_models_and_five_windows(method, grand):
    averages = [
        row["value"]
        for item in ("figure3a", "figure3b", "figureA1")
        for row in numbers.load(item)
        if (row["method"], row["benchmark"]) == (method, "avg")
    ]
    assert len(averages) == 15
    assert mean(averages) == pytest.approx(grand, abs=0.005)


@pytest.mark.parametrize("item", ["figure3a", "figure3b", "figureA1"])
def test_average_panels_are_the_mean_of_their_four_panels(item):
    for row in (row for row in numbers.load(item) if row["benchmark"] == "avg"):
        four = [numbers.lookup(item, {**row, "benchmark": benchmark}) for benchmark in BENCHMARKS]
        assert row["value"] == pytest.approx(mean(four), abs=1.1e-4), row


def test_table_1_averages_are_the_mean_of_six_scores():
    for row in (row for row in numbers.load("table1") if row["metric"] == "avg"):
        six = [numbers.lookup("table1", {**row, "metric": metric}) for metric in (*BENCHMARKS, *AIME)]
        assert row["value"] == pytest.approx(mean(six), abs=0.0501), row


def test_table_2_averages_hold_but_for_those_marked_as_slips():
    for row in (row for row in numbers.load("table2") if row["cache_window"] == "avg"):
        three = mean(numbers.lookup("table2", {**row, "cache_window": window}) for window in ("768", "1024", "1536"))
        assert (abs(row["value"] - three) > 0.0051) == bool(numbers.slips("table2", row)), row


def test_table_1_repeats_table_2_at_1536_but_for_the_cell_marked_as_a_slip():
    for row in (row for row in numbers.load("table1") if row["metric"] in AIME):
        there = {**row, "dataset": row["metric"].removesuffix("_pass16"), "cache_window": "1536"}
        differs = row["value"] != numbers.lookup("table2", there)
        assert differs == any("Table 2" in text for text in numbers.slips("table1", row)), row


def test_figures_4_and_5_repeat_figures_3b_and_a1_but_for_the_cell_marked_as_a_slip():
    for method in ("baseline", "lora", "lora_c", "pte"):
        at = {"benchmark": "math500", "method": method}
        short = numbers.lookup("figure5", {"method": method, "max_generation_length": "3072"})
        assert short == numbers.lookup("figure3b", {**at, "window": "1024"})
    for window in ("768", "1024", "1536", "2048", "3072"):
        for item, key, name, method in (
            ("figure4a", "variant", "baseline", "baseline"),
            ("figure4a", "variant", "global_32", "pte"),
            ("figure4b", "strategy", "baseline", "baseline"),
            ("figure4b", "strategy", "pte_sliding_window", "pte"),
        ):
            here = {key: name, "window": window}
            value = numbers.lookup(item, here)
            same = value == numbers.lookup("figureA1", {"benchmark": "math500", "method": method, "window": window})
            assert value is None or same != bool(numbers.slips(item, here)), (item, here)


def test_figure_6_shares_add_up_and_give_the_printed_long_shares():
    bars: dict[str, list[float]] = {}
    for row in numbers.load("figure6"):
        bars.setdefault(row["method"], []).append(row["value"])
    for method, heights in bars.items():
        assert sum(heights) == pytest.approx(1, abs=5e-6)
        assert 100 * sum(heights[-3:]) == pytest.approx(numbers.lookup("figure6_long", {"method": method}), abs=0.051)


def test_slips_name_cells_that_exist_and_keys_of_their_item():
    for slip in numbers.cell_slips():
        assert set(slip["keys"]) <= set(numbers.KEYS[slip["item"]]), slip
        fitting = [row for row in numbers.load(slip["item"]) if all(row[key] == x for key, x in slip["keys"].items())]
        assert fitting, slip
        assert all(slip["text"] in numbers.slips(slip["item"], row) for row in fitting)


def test_a_cell_without_a_slip_has_none():
    assert numbers.slips("table1", {"model": MODELS["figure3a"], "method": "lora", "metric": "math500"}) == []


def test_both_rows_of_figure_3_have_their_own_slips():
    keys = {"benchmark": "math500", "method": "pte", "window": "3072"}
    assert numbers.slips("figure3a", keys) == numbers.slips("figure3", {**keys, "panel": "3a"}) != []
    assert numbers.slips("figure3b", keys) == []


def test_general_slips_name_items_that_exist():
    listed = [text for item in plan.ITEMS for text in numbers.general_slips(item)]
    assert set(listed) < set(numbers.general_slips())
    assert any("3B model's numbers" in text for text in numbers.general_slips("table2"))


def test_ratios_are_compared_as_numbers_and_names_as_text():
    assert numbers.lookup("tableA1", {"eviction_ratio": "0.2"}) == 51.4
    assert numbers.lookup("figure5", {"method": "nan", "max_generation_length": "3072"}) is None


@pytest.mark.parametrize("call", [numbers.load, lambda item: numbers.lookup(item, {}), lambda i: numbers.slips(i, {})])
def test_unknown_items_are_refused(call):
    with pytest.raises(ValueError, match=r"no item 'table9'.*table1"):
        call("table9")


def test_a_cell_needs_all_its_keys():
    with pytest.raises(ValueError, match=r"metric not given"):
        numbers.lookup("table1", {"model": "Qwen2.5-3B-Instruct", "method": "pte"})


def test_loaded_rows_are_copies():
    numbers.load("tableA1")[0]["value"] = 0.0
    assert numbers.load("tableA1")[0]["value"] == 50.8


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("item", [item for item in plan.ITEMS if item != "figure6"])
def test_every_cell_of_the_plan_has_a_number_in_the_paper(item, scale):
    cells = plan.cells(item, scale)
    assert cells and all(numbers.lookup(item, cell.keys) is not None for cell in cells)
