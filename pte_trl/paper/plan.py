"""Which run gives which cell (stand-in)."""

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Training:
    model: str
    run: str
    options: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Evaluation:
    model: str
    run: str
    benchmark: str
    budget: int
    max_new_tokens: int
    evict_ratio: float
    eviction: str
    samples: int
    folder: str


@dataclass(frozen=True)
class Cell:
    keys: dict[str, str]
    source: Training | Evaluation | None
    metric: str


ITEMS = (
    "table1",
    "table2",
    "table3",
    "tableA1",
    "figure3",
    "figure4a",
    "figure4b",
    "figure5",
    "figure6",
    "figureA1",
)
TINY_BUDGETS = {768: 56, 1024: 64, 1536: 80, 2048: 96, 3072: 128}
EFFICIENCY = ("attention_tflops_max", "gpu_mem_peak_pct", "gpu_mem_mean_pct")


def _cell(item: str, keys: dict[str, str], scale: str) -> Cell:
    model = "tiny" if scale == "tiny" else keys.get("model", "qwen3b")
    run = keys.get("method") or keys.get("variant") or keys.get("strategy") or "pte"
    if "avg" in keys.values():
        return Cell(keys, None, "avg")
    if keys.get("metric") in EFFICIENCY:
        return Cell(keys, Training(model, run, (), f"outputs/{scale}/train/{model}/{run}"), keys["metric"])
    window = int(keys.get("window") or keys.get("cache_window") or 1024)
    length = int(keys.get("max_generation_length") or keys.get("generation_length") or 3072)
    if scale == "tiny":
        window, length = TINY_BUDGETS[window], length // 32
    benchmark = keys.get("benchmark") or keys.get("dataset") or keys.get("metric") or "math500"
    pass16 = "aime" in benchmark
    benchmark = benchmark.removesuffix("_pass16").removesuffix("_pass1")
    ratio = float(keys.get("eviction_ratio", 0.25))
    folder = f"outputs/{scale}/evaluate/{model}/{run}/{benchmark}-{window}-{length}-{ratio}"
    samples = 16 if pass16 else 5
    evaluation = Evaluation(model, run, benchmark, window, length, ratio, "sliding_window", samples, folder)
    return Cell(keys, evaluation, "lengths" if item == "figure6" else "pass@16" if pass16 else "pass@1")


def cells(item: str, scale: str) -> list[Cell]:
    """The cells of an item of the paper at a scale."""
    panels = ("3a", "3b") if item == "figure3" else (item,)
    out = []
    for panel in panels:
        name = f"figure{panel}" if item == "figure3" else item
        with (Path(__file__).parent / "data" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            keys = {key: value for key, value in row.items() if key not in ("value", "bin")}
            keys = {"panel": panel, **keys} if item == "figure3" else keys
            if scale == "tiny" and keys.get("model", "Qwen2.5-3B-Instruct") != "Qwen2.5-3B-Instruct":
                continue
            cell = _cell(item, keys, scale)
            if cell not in out:
                out.append(cell)
    return out


def stand_in(scale: str) -> dict:
    """What stands for what at a scale; empty at the paper's."""
    if scale == "paper":
        return {}
    return {
        "model": "tiny (stands in for Qwen2.5-3B-Instruct)",
        "note": "A million parameters on generated sums: the numbers say nothing about the paper's.",
    }
