"""Finished runs as rows: for every cell of the plan the paper's number, ours, and what ours rests on."""

import json
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from statistics import fmean

from experiments.paper import numbers
from experiments.paper.plan import EFFICIENCY, Cell, EvaluationRun, TrainingRun
from experiments.paper.scores import measure, parse
from pte_trl.evaluation.comparison import Scores, average
from pte_trl.evaluation.intervals import Interval, interval, interval_of_mean
from pte_trl.evaluation.metrics import standard_error
from pte_trl.evaluation.records import COMPLETE, read_records


@dataclass(frozen=True)
class Row:
    """One cell, the paper's number beside ours, in the unit of the paper (percent, or TFLOPs).

    Args:
        paper, ours: None where there is none.
        se: standard error of `ours`, in its unit: of a score over problems and seeds, of an efficiency over seeds.
        low, high: 95 % interval of a score; it says something too where the error is 0 or cannot be estimated.
        problems, samples: what `ours` rests on, samples per problem; None for averages and efficiency.
        seeds, planned: trainings that `ours` is the mean of, and how many there are to be.
        clean, clean_problems: the score without problems that the training data repeat, and how many are left; None
            where nobody has looked for them.
        by_formula: TFLOPs by the paper's formula, see `by_papers_formula`.
        at: our budget (for figure 5 our generation length) where the paper has its window; None without a source.
        memory_of: what `ours` is a share of, for efficiency.
        folder: of the run, done or not; of several seeds all, with a blank between them.
        scores: problem by problem, as shares; None without.
        trials: of each benchmark in `scores`, samples (of pass@k: groups of k) of all its problems and seeds.
    """

    keys: dict[str, str]
    metric: str
    paper: float | None
    ours: float | None = None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    problems: int | None = None
    samples: int | None = None
    seeds: int = 0
    planned: int = 0
    clean: float | None = None
    clean_problems: int | None = None
    by_formula: float | None = None
    slips: tuple[str, ...] = ()
    at: int | None = None
    memory_of: str | None = None
    folder: str | None = None
    scores: Scores | None = field(default=None, repr=False, compare=False)
    trials: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def difference(self) -> float | None:
        """To the paper's number; of TFLOPs those by the paper's formula."""
        ours = self.ours if self.by_formula is None else self.by_formula
        return None if ours is None or self.paper is None else ours - self.paper

    @property
    def bounds(self) -> Interval | None:
        return None if self.low is None else (self.low, self.high)


def rows(item: str, cells: list[Cell], bin_width: float = 100) -> list[Row]:
    """A row for every number of the paper, in the order given; cells that differ in their seed alone share one.

    Averages are of their sibling rows, where all of them have ours. Figure 6 has a row for every bin instead: see
    `histogram`.

    Raises:
        ValueError: a metric that this module does not know, or that a run's files do not hold.
    """
    if item == "figure6":
        return histogram(cells, bin_width)
    by_keys: dict[tuple, list[Cell]] = {}
    for cell in cells:
        by_keys.setdefault((cell.metric, *cell.keys.items()), []).append(cell)
    found = [_row(item, seeds) for seeds in by_keys.values()]
    return [_average(row, siblings(row, found)) if row.metric == "avg" else row for row in found]


def missing(rows: list[Row]) -> list[Row]:
    """The rows that have no number of ours yet."""
    return [row for row in rows if row.ours is None]


def siblings(row: Row, rows: list[Row]) -> list[Row]:
    """The scores that an average is the mean of: their keys differ from its own in the averaged column only.

    Raises:
        ValueError: the row is no average.
    """
    column = next((key for key, value in row.keys.items() if value == "avg"), None)
    if column is None:
        raise ValueError(f"{row.keys} is an average, but none of its keys is avg")
    return [
        other
        for other in rows
        if other.metric not in (*EFFICIENCY, "avg")
        and all(other.keys[key] == value for key, value in row.keys.items() if key != column)
    ]


def by_papers_formula(tflops: float) -> float:
    """Our TFLOPs of attention as the paper seems to count them: the whole square, twice the pairs that are visible.

    The paper gives no formula. Its full-cache figures of Table 1, 4.2, 5.7 and 7.4, are 4 L d T^2 of the published
    configurations with one T between 3,752 and 3,770 for all three models; ours has T (T + 1) / 2 pairs instead of
    T^2. Its LoRA_c figures, 2.6, 3.5 and 4.6, are 4 L d N with one N of 8.7 to 8.8 million, 0.62 T^2. No count of
    ours gives that N: with a window of the longest question, T - 3072, twice the visible pairs are 8.0 to 8.2
    million, 6 to 10 % less, and T times the cache's capacity is 5.1 to 5.3 million. PTE's figures, 2.7, 3.6 and 4.6,
    are no common multiple of L d. So this is the paper's formula for the full cache, and for a bounded cache the
    nearest that we know.
    """
    return 2 * tflops


def histogram(cells: list[Cell], bin_width: float = 100) -> list[Row]:
    """Figure 6: the share of correct responses, in percent, in every bin of generated tokens.

    Args:
        cells: of figure 6; one evaluation per method and seed. Responses of all seeds are counted together.
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
    for method, counts in found.items():
        folders = [cell.source.folder for cell in cells if cell.keys["method"] == method and cell.source]
        for name in [*names, "long"]:
            keys = {"method": method, "bin": name}
            item, percent = ("figure6_long", 1) if name == "long" else ("figure6", 100)
            paper = numbers.lookup(item, keys)
            row = Row(keys, "share", None if paper is None else percent * paper, folder=" ".join(folders) or None)
            if counts:
                low, high = bin_edges(name)
                share = sum(low * bin_width <= tokens < high * bin_width for tokens in counts) / len(counts)
                error = sqrt(share * (1 - share) / len(counts))
                bounds = interval(share, error, len(counts), len(counts))
                row = replace(row, ours=100 * share, se=100 * error, samples=len(counts), **_bounds(bounds))
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
    """Figure 6: for each method the generated tokens of every correct response, None while no run of it is done."""
    found: dict[str, list[int] | None] = {}
    for cell in cells:
        counts = found.setdefault(cell.keys["method"], None)
        if cell.source and done(cell.source):
            more = [row["tokens"] for row in read_records(cell.source.folder) if row["correct"]]
            found[cell.keys["method"]] = (counts or []) + more
    return found


def done(source: TrainingRun | EvaluationRun) -> bool:
    """Whether a run has finished: a training writes its manifest last, an evaluation's records are whole or absent."""
    folder = Path(source.folder)
    if isinstance(source, EvaluationRun):
        return (folder / COMPLETE).exists()
    return (folder / "manifest.json").exists() and (folder / "efficiency.json").exists()


def _row(item: str, cells: list[Cell]) -> Row:
    """The row of cells with the same keys, one for each seed. A cell without a source is left out of the plan."""
    keys, metric = cells[0].keys, cells[0].metric
    row = Row(keys, metric, numbers.lookup(item, keys), slips=tuple(numbers.slips(item, keys)))
    sources = list({cell.source.folder: cell.source for cell in cells if cell.source is not None}.values())
    if not sources:
        return row
    row = replace(row, folder=" ".join(source.folder for source in sources), planned=len(sources))
    if isinstance(sources[0], EvaluationRun):
        cut = parse(metric)[1]
        row = replace(row, at=cut or (sources[0].max_new_tokens if item == "figure5" else sources[0].budget))
    ready = [source for source in sources if done(source)]
    if not ready:
        return row
    return (_score if isinstance(ready[0], EvaluationRun) else _efficiency)(replace(row, seeds=len(ready)), ready)


def _score(row: Row, sources: list[EvaluationRun]) -> Row:
    """With the score of these seeds, on the problems that all of them have."""
    measured = {_seed(source): measure(source, row.metric) for source in sources}
    first = next(iter(measured.values()))
    scores = Scores.of(sources[0].benchmark, {seed: one.scores for seed, one in measured.items()})
    samples = min(one.samples for one in measured.values())
    trials = {sources[0].benchmark: scores.problems * (samples // first.tries) * len(measured)}
    row = _with_scores(replace(row, problems=scores.problems, samples=samples), scores, trials)
    if first.clean is None:
        return row
    kept = [[score for name, score in one.scores.items() if name in first.clean] for one in measured.values()]
    clean = fmean(map(fmean, kept)) if all(kept) else None
    return replace(row, clean=_percent(clean), clean_problems=min(map(len, kept)))


def _seed(source: EvaluationRun) -> int:
    """Of the training; 0 stands for the recipe's own, which the plan does not name."""
    return getattr(source, "seed", None) or 0


def _with_scores(row: Row, scores: Scores, trials: dict[str, int]) -> Row:
    """Mean, error and interval; the benchmarks of an average are independent of each other.

    An average has no error where one of its benchmarks is solved wholly or not at all: that one's would count as 0.
    """
    shares, bounds = [], []
    for name, seeds in scores.values.items():
        one = Scores.of(name, seeds)
        shares.append(one.mean)
        bounds.append(interval(one.mean, one.standard_error, one.problems, trials[name]))
    ours, se = _percent(scores.mean), _percent(scores.standard_error)
    weights = [scores.weights[name] for name in scores.values]
    limits = interval_of_mean(shares, bounds, weights)
    if len(shares) > 1 and not all(0 < share < 1 for share in shares):
        se = None
    return replace(row, ours=ours, se=se, scores=scores, trials=trials, **_bounds(limits))


def _bounds(limits: Interval) -> dict:
    return {"low": 100 * limits[0], "high": 100 * limits[1]}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _efficiency(row: Row, sources: list[TrainingRun]) -> Row:
    """With the mean of what these trainings measured."""
    values, first = [], None
    for source in sources:
        path = Path(source.folder) / "efficiency.json"
        measured = json.loads(path.read_text())
        first = first or measured
        if row.metric not in measured:
            raise ValueError(f"{path} holds no {row.metric}")
        values.append(measured[row.metric])
    if None in values:  # of models whose attention the project cannot count
        return row
    ours = fmean(values)
    tflops = by_papers_formula(ours) if row.metric == "attention_tflops_max" else None
    return replace(row, ours=ours, se=standard_error(values), by_formula=tflops, memory_of=first.get("memory_of"))


def _average(row: Row, parts: list[Row]) -> Row:
    """The mean of these rows where all have ours under a common seed.

    Parts on the same problems, as the windows of table 2, are averaged problem by problem before an error is taken.
    """
    if not parts or missing(parts) or not set.intersection(*(set(part.scores.seeds) for part in parts)):
        return row
    trials: dict[str, int] = {}
    for part in parts:
        for name, count in part.trials.items():
            trials[name] = min(count, trials.get(name, count))
    seeds, planned = min(part.seeds for part in parts), max(part.planned for part in parts)
    row = replace(_with_scores(row, average([part.scores for part in parts]), trials), seeds=seeds, planned=planned)
    clean = [part.clean for part in parts]
    return row if None in clean else replace(row, clean=fmean(clean))
