"""Runs written by hand in the format of real ones, for the tests of tables, figures and the page."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.paper.plan import Cell, EvaluationRun, TrainingRun

MODEL = "Qwen2.5-3B-Instruct"
MATH = [[1, 1], [1, 0], [0, 0], [0, 0]]  # pass@1 (1 + 1/2) / 4 = 37.5 %; squared error 0.6875 / 3 / 4 = 0.05729
AIME = [[0] * 15 + [1], [1] * 16, [0] * 16, [0] * 16]  # pass@16 2/4 = 50 %; squared error 1 / 3 / 4 = 0.08333
STAND_IN = {"model": "a <small> model", "note": "Its numbers & the paper's differ.", "bin_width": 3}


@dataclass(frozen=True)
class Seeded(EvaluationRun):
    """An evaluation of a training with this seed."""

    seed: int | None = None


def write_evaluation(
    folder: Path,
    verdicts: list[list[int]],
    tokens: list[list[int]] | None = None,
    repeated: tuple[int, ...] = (),
    **settings,
) -> str:
    """records.jsonl of problems x samples, and a manifest.

    Args:
        repeated: problems that the training data repeat.
        settings: more keys of every record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem_id": f"p{i}",
            "sample": k,
            "gold": "1",
            "extracted": "1" if correct else "2",
            "correct": bool(correct),
            "completion": r"\boxed{1}",
            "tokens": tokens[i][k] if tokens else 10,
            "finish_reason": "stop",
            "evictions": 0,
            "budget": 64,
            "window": 32,
            "contaminated": i in repeated,
            "gold_note": None,
            **settings,
        }
        for i, samples in enumerate(verdicts)
        for k, correct in enumerate(samples)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.json").write_text(json.dumps({"commit": "c0ffee", "settings": {"seed": 7}}))
    return str(folder)


def write_training(folder: Path, tflops: float = 3.25, **settings) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    measured = {"attention_tflops_max": tflops, "gpu_mem_peak_pct": 40.0, "gpu_mem_mean_pct": 30.5}
    (folder / "efficiency.json").write_text(json.dumps({**measured, "memory_of": "a card of 40 GB"}))
    (folder / "manifest.json").write_text(
        json.dumps({"commit": "decade", "processes": 8, "settings": {"seed": 42} | settings})
    )
    return str(folder)


def evaluation(folder, budget: int = 3072, length: int = 3072, benchmark: str = "math500") -> EvaluationRun:
    return EvaluationRun("qwen3b", "pte", benchmark, budget, length, 0.25, "sliding_window", 2, str(folder))


def table1_cells(root: Path) -> list[Cell]:
    """PTE's line of table 1 with two scores and their average, and a baseline that lacks one of the two."""

    def keys(method: str, metric: str) -> dict[str, str]:
        return {"model": MODEL, "method": method, "metric": metric}

    cells = []
    for method in ("baseline", "pte"):
        cells += [
            Cell(keys(method, "math500"), evaluation(root / method / "math500"), "pass@1"),
            Cell(keys(method, "aime24_pass16"), evaluation(root / method / "aime24", benchmark="aime24"), "pass@16"),
            Cell(keys(method, "avg"), None, "avg"),
        ]
    trained = TrainingRun("qwen3b", "pte", (), str(root / "train"))
    return [*cells, Cell(keys("pte", "attention_tflops_max"), trained, "attention_tflops_max")]


def write_table1_runs(root: Path) -> None:
    """Everything of `table1_cells` but the baseline's AIME."""
    write_evaluation(root / "baseline" / "math500", MATH)
    write_evaluation(root / "pte" / "math500", MATH)
    write_evaluation(root / "pte" / "aime24", AIME)
    write_training(root / "train")
