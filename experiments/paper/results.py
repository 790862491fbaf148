"""Finished runs as rows: for every cell of the plan the paper's number, ours, and what ours rests on."""

import json
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path

from experiments.paper import numbers
from experiments.paper.plan import Cell, EvaluationRun, TrainingRun
from pte_trl.evaluation.metrics import summarise
from pte_trl.evaluation.records import COMPLETE, read_records


@dataclass(frozen=True)
class Row:
    """One cell, the paper's number beside ours, in the unit of the paper (percent, or TFLOPs).

    Args:
        paper, ours: None where there is none.
        se: standard error of `ours`, in its unit; None for a measured efficiency.
        problems, samples: what `ours` rests on, samples per problem; None for averages and efficiency.
        at: our budget (for figure 5 our generation length) where the paper has its window; None without a source.
        memory_of: what `ours` is a share of, for efficiency.
        folder: of the run, done or not.
    """

    keys: dict[str, str]
    metric: str
    paper: float | None
    ours: float | None = None
    se: float | None = None
    problems: int | None = None
    samples: int | None = None
    slips: tuple[str, ...] = ()
    at: int | None = None
    memory_of: str | None = None
    folder: str | None = None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.paper is None else self.ours - self.paper


def rows(item: str, cells: list[Cell], bin_width: float = 100) -> list[Row]:
    """A row for every cell, in the order given; averages from their sibling rows, where all of them have ours.

    Figure 6 has a row for every bin instead: see `histogram`.

    Raises:
        ValueError: a metric that this module does not know, or that a run's files do not hold.
    """
    if item == "figure6":
        return histogram(cells, bin_width)
    found = [_row(item, cell) for cell in cells]
    return [
        _average(row, found, cells) if cell.metric == "avg" else row for row, cell in zip(found, cells, strict=True)
    ]


def missing(rows: list[Row]) -> list[Row]:
    """The rows that have no number of ours yet."""
    return [row for row in rows if row.ours is None]


def histogram(cells: list[Cell], bin_width: float = 100) -> list[Row]:
    """Figure 6: the share of correct responses, in percent, in every bin of generated tokens.

    Args:
        cells: of figure 6; one evaluation per method.
        bin_width: tokens that stand for the paper's hundred. Its first bin starts at one of them, its last is open.

    Returns:
        For each method the paper's bins, its sum from six bin widths up ("long"), and a bin for shorter responses
        than the paper shows, if any of ours is so short. `samples` is the number of correct responses; without one
        there is no share.
    """
    out, found = [], lengths(cells)
    names = list(dict.fromkeys(row["bin"] for row in numbers.load("figure6")))
    if any(tokens < bin_width for counts in found.values() for tokens in counts or ()):
        names.insert(0, "0.0-1.0")
    folders = {cell.keys["method"]: cell.source.folder for cell in cells}
    for method, counts in found.items():
        for name in [*names, "long"]:
            keys = {"method": method, "bin": name}
            item, percent = ("figure6_long", 1) if name == "long" else ("figure6", 100)
            paper = numbers.lookup(item, keys)
            row = Row(keys, "share", None if paper is None else percent * paper, folder=folders[method])
            if counts:
                low, high = bin_edges(name)
                share = sum(low * bin_width <= tokens < high * bin_width for tokens in counts) / len(counts)
                error = sqrt(share * (1 - share) / len(counts))
                row = replace(row, ours=100 * share, se=100 * error, samples=len(counts))
            out.append(replace(row, slips=tuple(numbers.slips(item, keys))))
    return out


def bin_width(stand_in: dict) -> float:
    """Tokens per bin of figure 6: the paper's 100; for a stand-in what it says, or 1/32 of that."""
    return stand_in.get("bin_width", 100 / 32) if stand_in else 100


def bin_edges(name: str) -> tuple[float, float]:
    """A bin of figure 6 in units of its width: "1.0-2.0", "8.0-inf", or "long", the paper's shaded bars."""
    low, high = ("6.0", "inf") if name == "long" else name.split("-")
    return float(low), float(high)


def lengths(cells: list[Cell]) -> dict[str, list[int] | None]:
    """Figure 6: for each method the generated tokens of every correct response, None while its run is not done."""
    return {
        cell.keys["method"]: [row["tokens"] for row in read_records(cell.source.folder) if row["correct"]]
        if done(cell.source)
        else None
        for cell in cells
    }


def done(source: TrainingRun | EvaluationRun) -> bool:
    """Whether a run has finished: a training writes its manifest last, an evaluation's records are whole or absent."""
    folder = Path(source.folder)
    if isinstance(source, EvaluationRun):
        return (folder / COMPLETE).exists()
    return (folder / "manifest.json").exists() and (folder / "efficiency.json").exists()


def _row(item: str, cell: Cell) -> Row:
    paper = numbers.lookup(item, cell.keys)
    base = {"keys": cell.keys, "metric": cell.metric, "paper": paper, "slips": tuple(numbers.slips(item, cell.keys))}
    source = cell.source
    if source is None:
        if cell.metric != "avg":
            raise ValueError(f"{item} {cell.keys}: no source for {cell.metric}, and only averages need none")
        return Row(**base)
    base["folder"] = source.folder
    if isinstance(source, EvaluationRun):
        base["at"] = source.max_new_tokens if item == "figure5" else source.budget
    if not done(source):
        return Row(**base)
    return Row(**base, **(_score if isinstance(source, EvaluationRun) else _efficiency)(source, cell.metric))


def _score(source: EvaluationRun, metric: str) -> dict:
    path = Path(source.folder) / COMPLETE
    summary = _summary(source.folder, path.stat().st_mtime_ns)
    counts = {"problems": summary["problems"], "samples": summary["samples"]}
    if metric == "pass@1":
        return {"ours": 100 * summary["pass@1"], "se": _percent(summary["pass@1_se"]), **counts}
    name, _, k = metric.partition("@")
    if name != "pass" or not k.isdigit():
        raise ValueError(f"{metric} is not a metric of an evaluation")
    if k not in summary["pass@k"]:
        raise ValueError(f"{path} has {summary['samples']} samples per problem, too few for {metric}")
    return {"ours": 100 * summary["pass@k"][k], "se": _percent(summary["pass@k_se"][k]), **counts}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


@cache
def _summary(folder: str, changed: int) -> dict:
    # Several tables share a folder; `changed` makes a rewritten one count as new.
    return summarise(read_records(Path(folder)))


def _efficiency(source: TrainingRun, metric: str) -> dict:
    path = Path(source.folder) / "efficiency.json"
    measured = json.loads(path.read_text())
    if metric not in measured:
        raise ValueError(f"{path} holds no {metric}")
    return {"ours": measured[metric], "memory_of": measured.get("memory_of")}


def _average(row: Row, found: list[Row], cells: list[Cell]) -> Row:
    """The mean of the scores whose keys differ in the averaged column only.

    Their errors add as those of independent samples. Cells of one benchmark under several windows share its
    problems, so for table 2 the error is too small rather than too large.
    """
    column = next((key for key, value in row.keys.items() if value == "avg"), None)
    if column is None:
        raise ValueError(f"{row.keys} is an average, but none of its keys is avg")
    siblings = [
        other
        for other, cell in zip(found, cells, strict=True)
        if isinstance(cell.source, EvaluationRun)  # not the efficiency columns
        and all(other.keys[key] == value for key, value in row.keys.items() if key != column)
    ]
    if not siblings or missing(siblings):
        return row
    ours = sum(other.ours for other in siblings) / len(siblings)
    errors = [other.se for other in siblings]
    se = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
    return replace(row, ours=ours, se=se)
