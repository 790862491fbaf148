"""What stands around a table: deviations from the paper, what is missing, clean scores, TFLOPs as the paper counts."""

import json
from pathlib import Path

import pytest

from experiments.paper import numbers, plan, results, scores, tables
from experiments.paper.captions import missing_names
from experiments.paper.deviations import data, deviations
from experiments.paper.plan import Cell
from experiments.tiny.model import build
from pte_trl.cache.schedule import Schedule
from pte_trl.rewards.grader import Grader
from pte_trl.runtime.efficiency import visible_pairs
from tests.paper_runs import MATH, MODEL, STAND_IN, evaluation, table1_cells, write_evaluation, write_training

SHAPES = Path(results.__file__).parents[2] / "pte_trl" / "estimate" / "shapes"
SHAPE_OF = {MODEL: "qwen2.5-3b", "Qwen2.5-7B-Instruct": "qwen2.5-7b", "DeepSeek-R1-Distill-Llama-8B": "llama-8b"}


def of(item, cells, scale="paper", stand_in=None):
    return deviations(item, scale, cells, results.rows(item, cells), stand_in or {})


def one_cell(folder, **changes) -> list[Cell]:
    return [Cell({"model": MODEL, "method": "pte", "metric": "math500"}, evaluation(folder, **changes), "pass@1")]


def test_the_list_names_what_the_runs_have_otherwise(tmp_path):
    settings = {"learning_rate": 2e-4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "rank": 32}
    settings |= {"beta": 0.04, "target_modules": ["q_proj", "o_proj"], "window": 16, "decontaminate": True}
    adapter = write_training(tmp_path / "train", **settings)
    write_evaluation(tmp_path / "run", MATH, adapter=adapter, temperature=0.6, system_prompt="Think first.")
    problems, counts, training, open_training, open_evaluation = of("table1", one_cell(tmp_path / "run"))
    assert problems == "Problems: MATH-500 4 (the paper says 500)."
    assert counts == "Samples per problem: 2 for pass@1 (the paper has 5)."
    assert training == (
        "Training: window 16 (the paper: the longest question of the micro-batch); completions a step 64 (the paper: "
        "512); learning rate 0.0002 (the paper: 1e-05)."
    )
    assert open_training == (
        "Not stated in the paper, for training: KL weight 0.04; seed 42; benchmark problems removed yes; "
        "adapted layers q_proj + o_proj."
    )
    assert open_evaluation == 'Not stated in the paper, for evaluation: temperature 0.6; instruction "Think first.".'


def test_the_papers_own_values_are_no_deviation(tmp_path):
    stated = {entry["key"]: entry["paper"][0] for entry in data()["training_stated"] if entry["paper"]}
    del stated["completions"]  # of the step's: 8 x 8 on the 8 processes of `write_training`
    adapter = write_training(
        tmp_path / "train", **stated, per_device_train_batch_size=8, gradient_accumulation_steps=8
    )
    write_evaluation(tmp_path / "run", [[1] * 5] * 500, adapter=adapter)
    (only,) = of("table1", one_cell(tmp_path / "run"))
    assert only == "Not stated in the paper, for training: seed 42."


def test_settings_that_differ_between_runs_are_all_named(tmp_path):
    cells = []
    for name, temperature in {"a": 0.6, "b": 1.0}.items():
        write_evaluation(tmp_path / name, MATH, temperature=temperature)
        cells += one_cell(tmp_path / name)
    assert "temperature 0.6, 1" in of("table1", cells)[-1]


def test_prompts_without_room_are_counted(tmp_path):
    write_evaluation(tmp_path / "run", MATH, finish_reason="no_room")
    text = "Prompts that leave no room in the budget count as wrong: MATH-500 4 of 4 under 3072."
    assert text in of("table1", one_cell(tmp_path / "run"))


def test_texts_stand_where_the_item_has_the_numbers_they_are_about(tmp_path):
    cells = table1_cells(tmp_path)
    assert of("table1", cells) == []  # nothing has been run
    write_training(tmp_path / "train")
    assert [text.partition(":")[0] for text in of("table1", cells)] == [
        "Not stated in the paper, for training",
        "TFLOPs",
    ]
    write_evaluation(tmp_path / "cut", [[1] * 5] * 500)
    keys = {"method": "pte", "max_generation_length": "3072"}
    cut = [Cell(keys, evaluation(tmp_path / "cut", length=96), "pass@1@96")]
    assert any("cut off" in text for text in of("figure5", cut))


def test_a_stand_in_is_the_first_of_them(tmp_path):
    write_evaluation(tmp_path / "run", MATH)
    assert of("table1", one_cell(tmp_path / "run"), "tiny", STAND_IN)[0] == "Model: a <small> model."


def test_the_data_name_items_and_scores_that_exist():
    assert {item for entry in data()["texts"] for item in entry["items"]} <= set(plan.ITEMS)
    assert set(data()["problems"]) == {"math500", "olympiadbench", "minerva_math", "amc23", "aime24", "aime25"}
    names = [entry["key"] for part in ("training_stated", "training_unstated") for entry in data()[part]]
    assert len(set(names)) == len(names)


def test_clean_scores_are_of_the_problems_that_training_does_not_repeat(tmp_path):
    write_evaluation(tmp_path / "run", MATH, repeated=(0,))
    rows = results.rows("table1", one_cell(tmp_path / "run"))
    assert rows[0].clean == pytest.approx(100 * 0.5 / 3) and rows[0].clean_problems == 3
    (section,) = tables.sections("table1", rows)
    assert [line[1:] for line in section.lines] == [
        ["paper", "54.0"],
        ["ours", "37.5 ±23.9"],
        ["clean", "16.7"],
        ["diff", "-16.5"],
        ["n", "4 x 2 (3 clean)"],
    ]
    assert "clean: without the problems" in tables.markdown("table1", rows, {})


def test_where_nobody_has_looked_there_is_no_clean_score(tmp_path):
    write_evaluation(tmp_path / "run", MATH)
    rows = results.rows("table1", one_cell(tmp_path / "run", benchmark="tiny_math500"))
    assert rows[0].clean is None and "No clean scores" in tables.markdown("table1", rows, {})


def test_without_a_clean_problem_there_is_no_clean_score(tmp_path):
    write_evaluation(tmp_path / "run", MATH, repeated=(0, 1, 2, 3))
    (row,) = results.rows("table1", one_cell(tmp_path / "run"))
    assert (row.clean, row.clean_problems) == (None, 0)


@pytest.mark.parametrize("verdict, text", {1: "100.0 [51.0, 100]", 0: "0.0 [0, 49.0]"}.items())
def test_all_right_and_all_wrong_have_an_interval(tmp_path, verdict, text):
    write_evaluation(tmp_path / "run", [[verdict, verdict]] * 4)  # 1 / (1 + 3.8415 / 4) = 0.5101
    (section,) = tables.sections("table1", results.rows("table1", one_cell(tmp_path / "run")))
    assert section.lines[1][-1] == text


def test_a_cell_that_is_left_out_of_the_plan_is_missing():
    rows = results.rows("table1", [Cell({"model": MODEL, "method": "pte", "metric": "math500"}, None, "pass@1")])
    (section,) = tables.sections("table1", rows)
    assert section.lines == [["PTE", "paper", "54.0"], ["", "ours", "-"]]
    assert missing_names("table1", rows) == [f"{MODEL} (all)"]


def test_missing_numbers_are_named(tmp_path):
    cells = table1_cells(tmp_path)
    for name in ("baseline/math500", "pte/math500", "pte/aime24"):
        write_evaluation(tmp_path / name, MATH if "math" in name else [[1] * 16] * 2)
    rows = results.rows("table1", cells)
    assert missing_names("table1", rows) == [f"{MODEL}, Base (AIME24 @16)", f"{MODEL}, PTE (TFLOPs max)"]
    assert f"Missing: 3 of 7 numbers of ours, marked -: {MODEL}, Base (AIME24 @16); " in tables.markdown(
        "table1", rows, {}
    )


def test_a_long_list_of_missing_numbers_is_cut_short():
    rows = results.rows("figure3", plan.cells("figure3", "paper"))
    assert missing_names("figure3", rows)[0] == "3a, Qwen2.5-7B-Instruct, MATH-500 (all)"
    assert ", and 2 more lines." in tables.markdown("figure3", rows, {})


def test_completions_within_the_length_are_not_cut(tmp_path):
    write_evaluation(tmp_path / "run", MATH)
    source = evaluation(tmp_path / "run", length=96)
    keys = {"method": "pte", "max_generation_length": "3072"}
    (row,) = results.rows("figure5", [Cell(keys, source, "pass@1@96")])
    assert (row.ours, row.at) == (37.5, 96)
    with pytest.raises(ValueError, match=r"pass@1@97: .* has completions of 96 tokens at most"):
        results.rows("figure5", [Cell(keys, source, "pass@1@97")])


def test_longer_completions_are_cut_and_graded_again_by_one_grader(tmp_path, monkeypatch):
    made = []

    class Counted(Grader):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr("pte_trl.rewards.grader.Grader", Counted)
    scores._grader.cache_clear()
    model, tokenizer = build(seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    answer = r"\boxed{1}"
    ids = tokenizer("so " * 20 + answer)["input_ids"]
    settings = {"completion": "so " * 20 + answer, "completion_ids": ids, "max_new_tokens": 96, "evict_ratio": 0.25}
    settings |= {"model_name_or_path": str(tmp_path / "model")}
    write_evaluation(tmp_path / "run", [[1], [1]], tokens=[[len(ids)], [len(ids)]], **settings)
    source, keys = evaluation(tmp_path / "run", length=96), {"method": "pte", "max_generation_length": "3072"}
    cells = [Cell(keys, source, f"pass@1@{length}") for length in (len(ids), len(ids) - 3, len(ids) - 4)]
    assert [(row.ours, row.at) for row in results.rows("figure5", cells)] == [
        (100, len(ids)),
        (0, len(ids) - 3),
        (0, len(ids) - 4),
    ]
    assert len(made) == 1
    made[0].close()
    scores._grader.cache_clear()


@pytest.mark.parametrize("metric", ["accuracy", "pass@0", "pass@", "pass@1@", "pass@1@x"])
def test_metrics_that_are_none_are_refused(tmp_path, metric):
    write_evaluation(tmp_path / "run", MATH)
    with pytest.raises(ValueError, match="not a metric of an evaluation; allowed are pass@K and pass@K@LENGTH"):
        results.rows(
            "figure5", [Cell({"method": "pte", "max_generation_length": "3072"}, evaluation(tmp_path / "run"), metric)]
        )


# ---- TFLOPs as the paper counts them ---------------------------------------------------------------------------


def products(method: str) -> list[tuple[float, float]]:
    """For each model the range of N in 4 L d N that rounds to the paper's figure."""
    out = []
    for model, name in SHAPE_OF.items():
        shape = json.loads((SHAPES / name / "config.json").read_text())
        each = 4 * shape["num_hidden_layers"] * shape["hidden_size"] / 1e12
        figure = numbers.lookup("table1", {"model": model, "method": method, "metric": "attention_tflops_max"})
        out.append(((figure - 0.05) / each, (figure + 0.05) / each))
    return out


def common(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def test_one_square_fits_the_papers_full_cache():
    low, high = common(products("lora"))
    assert (round(low**0.5), round(high**0.5)) == (3752, 3770)
    for length in (3752, 3770):
        pairs = visible_pairs(length - 3072, 3072, None)
        assert results.by_papers_formula(pairs) == pytest.approx(length**2, rel=1e-3)


def test_twice_the_visible_pairs_are_less_than_the_papers_bounded_cache():
    low, high = common(products("lora_c"))
    assert (low, high) == pytest.approx((8.68e6, 8.84e6), rel=1e-3)  # one N fits all three models
    ours = [results.by_papers_formula(visible_pairs(w, 3072, Schedule(w))) for w in (680, 698)]
    assert ours == pytest.approx([7.95e6, 8.16e6], rel=1e-3)
    assert 0.895 < ours[0] / high < ours[1] / low < 0.945
    least, most = common(products("pte"))
    assert least > most  # no N fits PTE's three figures
    below = [1 - count / n for bounds in products("pte") for count, n in zip(ours[::-1], bounds, strict=True)]
    assert (min(below), max(below)) == pytest.approx((0.06, 0.147), abs=0.002)
