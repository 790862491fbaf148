"""PTE minus each method that it is compared with, paired: the same problems, and the same seeds."""

from dataclasses import dataclass, replace
from statistics import fmean

from experiments.paper.plan import EFFICIENCY
from experiments.paper.results import Row, siblings
from pte_trl.evaluation.comparison import Scores, average

METHOD = "pte"
OTHERS = ("lora_c", "lora", "vanilla")


@dataclass(frozen=True)
class Difference:
    """Of two rows that differ in their method only, in points (percent of the problems).

    Args:
        keys: of PTE's row.
        other: the method that it is compared with.
        paper, ours: None where one of the two numbers is missing.
        se: standard error of `ours` over the problems' differences, and over seeds where there are several; 0 where no
            problem differs, None for a single problem.
        problems, seeds: that both have.
        parts: of an average, how many of its scores are there in both, and how many there are to be. Both `paper`
            and `ours` are of those.
    """

    keys: dict[str, str]
    other: str
    paper: float | None
    ours: float | None = None
    se: float | None = None
    problems: int | None = None
    seeds: int | None = None
    parts: tuple[int, int] | None = None


def differences(rows: list[Row]) -> list[Difference]:
    """Of every score of PTE, in the order of the rows; nothing for items that have no methods."""
    by_keys = {tuple(row.keys.items()): row for row in rows}
    out = []
    for other in OTHERS:
        for row in rows:
            if row.keys.get("method") == METHOD and row.metric not in (*EFFICIENCY, "share"):
                theirs = by_keys.get(tuple({**row.keys, "method": other}.items()))
                if theirs is not None:
                    out.append(_difference(row, theirs, rows))
    return out


def _difference(row: Row, theirs: Row, rows: list[Row]) -> Difference:
    if row.metric == "avg":
        return _of_averages(row, theirs, rows)
    out = Difference(row.keys, theirs.keys["method"], _minus(row.paper, theirs.paper))
    paired = _paired(row, theirs)
    return out if paired is None else _with(out, paired)


def _of_averages(row: Row, theirs: Row, rows: list[Row]) -> Difference:
    """Over the scores that both have, so that a table of which a part is run has an average too."""
    by_part = {_part(row, other): other for other in siblings(theirs, rows)}
    pairs = [(mine, by_part[_part(row, mine)]) for mine in siblings(row, rows) if _part(row, mine) in by_part]
    there = [(mine, other, paired) for mine, other in pairs if (paired := _paired(mine, other)) is not None]
    common = set.intersection(*(set(paired.seeds) for _, _, paired in there)) if there else set()
    if len(there) == len(pairs) or not common:
        paper = _minus(row.paper, theirs.paper)
    else:
        paper = fmean(mine.paper - other.paper for mine, other, _ in there)
    out = Difference(row.keys, theirs.keys["method"], paper, parts=(len(there), len(pairs)))
    return _with(out, average([paired for *_, paired in there])) if common else out


def _part(average: Row, row: Row) -> tuple[str, ...]:
    """What tells a score of an average from the others."""
    return tuple(row.keys[key] for key, value in average.keys.items() if value == "avg")


def _paired(row: Row, theirs: Row) -> Scores | None:
    """None where a score is missing, or the two have no problem under the same seed."""
    if row.scores is None or theirs.scores is None:
        return None
    try:
        return row.scores.minus(theirs.scores)
    except ValueError:
        return None


def _with(out: Difference, paired: Scores) -> Difference:
    error = paired.standard_error
    measured = {"ours": 100 * paired.mean, "se": None if error is None else 100 * error}
    return replace(out, **measured, problems=paired.problems, seeds=len(paired.seeds))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
