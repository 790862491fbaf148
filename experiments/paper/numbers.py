"""The numbers of arXiv 2602.16839 (v1) as data, and the slips found in them.

`data/ITEM.csv` holds one row per number: the key columns of `KEYS`, and the value. Tables are as printed; figures are
read from the vector drawings, to within 0.00005. Scores, shares of GPU memory and `figure6_long` are percent,
`attention_tflops_max` is TFLOPs, figure 6's values are shares between 0 and 1. Methods: `baseline` (no training),
`lora` (full cache), `lora_c` (bounded cache) and `pte`; `vanilla` of table 3 is `lora`. The paper's "4B" model is
keyed Qwen2.5-3B-Instruct, its K is taken as 1024. A number that the paper leaves blank has no row.
"""

import csv
import json
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"

KEYS = {
    "table1": ("model", "method", "metric"),
    "table2": ("dataset", "model", "method", "cache_window"),
    "table3": ("method", "generation_length", "metric"),
    "tableA1": ("eviction_ratio",),
    "figure3": ("panel", "benchmark", "method", "window"),
    "figure3a": ("benchmark", "method", "window"),
    "figure3b": ("benchmark", "method", "window"),
    "figure4a": ("variant", "window"),
    "figure4b": ("strategy", "window"),
    "figure5": ("method", "max_generation_length"),
    "figure6": ("method", "bin"),
    "figure6_long": ("method",),
    "figureA1": ("benchmark", "method", "window"),
}


def load(item: str) -> list[dict]:
    """All numbers of an item, in the paper's order: its key columns as text, and `value` as a float.

    Figure 3 is both of its rows of panels, told apart by the key `panel`, 3a or 3b.

    Raises:
        ValueError: the paper has no such item.
    """
    return [dict(row) for row in _load(item)]


def lookup(item: str, keys: dict[str, str]) -> float | None:
    """The paper's number for a cell, or None where the paper has none.

    Raises:
        ValueError: unknown item, or `keys` lacks a key column of the item.
    """
    columns = _columns(item)
    if lacking := [column for column in columns if column not in keys]:
        raise ValueError(f"a cell of {item} is named by {', '.join(columns)}; {', '.join(lacking)} not given")
    found = [row["value"] for row in _load(item) if all(same(row[column], keys[column]) for column in columns)]
    return found[0] if found else None


def slips(item: str, keys: dict[str, str]) -> list[str]:
    """What is known to be wrong with, or contradicted about, the paper's number of a cell: a sentence each.

    Raises:
        ValueError: unknown item.
    """
    _columns(item)
    if item in ("figure3a", "figure3b"):
        item, keys = "figure3", {"panel": item.removeprefix("figure"), **keys}
    return [
        slip["text"]
        for slip in cell_slips()
        if slip["item"] == item and all(key in keys and same(keys[key], x) for key, x in slip["keys"].items())
    ]


def cell_slips() -> list[dict]:
    """Every slip that touches cells: `item`, `keys` (all cells that fit these columns) and `text`."""
    return _slips()["cells"]


def general_slips(item: str | None = None) -> list[str]:
    """Slips that touch no cell: those about one item, or all of them."""
    return [slip["text"] for slip in _slips()["general"] if item is None or item in slip["items"]]


def same(a: str, b: str) -> bool:
    """Whether two key values are the same; 0.20 and 0.2 are."""
    if a == b:
        return True
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def _columns(item: str) -> tuple[str, ...]:
    if item not in KEYS:
        raise ValueError(f"the paper has no item {item!r}; it has {', '.join(KEYS)}")
    return KEYS[item]


@cache
def _load(item: str) -> tuple[dict, ...]:
    columns = _columns(item)
    if item == "figure3":
        return tuple({"panel": panel, **row} for panel in ("3a", "3b") for row in _load(f"figure{panel}"))
    with (DATA / f"{item}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple({**{column: row[column] for column in columns}, "value": float(row["value"])} for row in rows)


@cache
def _slips() -> dict:
    return json.loads((DATA / "slips.json").read_text())
