"""Scores problem by problem: their mean, its standard error over problems and training seeds, paired differences.

    pte.minus(lora_c).standard_error      # of the difference, paired by problem

Scores are shares between 0 and 1. A problem is one observation however often it was sampled, since its samples
resemble each other (Miller, Adding Error Bars to Evals, arXiv 2411.00640). Two methods that solved the same problems
are compared problem by problem, as that paper advises: how hard a problem is then leaves the error.
"""

from collections import Counter
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance


@dataclass(frozen=True)
class Scores:
    """Scores, or differences of scores, by benchmark, training seed and problem.

    Args:
        values: benchmark -> seed -> problem id -> mean over the samples of that problem. All seeds of a benchmark
            have the same problems.
        weights: benchmark -> its share in the mean. They add up to 1.
    """

    values: dict[str, dict[int, dict[str, float]]]
    weights: dict[str, float]

    @classmethod
    def of(cls, benchmark: str, seeds: dict[int, dict[str, float]]) -> "Scores":
        """Of one benchmark, on the problems that all its seeds have.

        Raises:
            ValueError: no problem, or none that all seeds have.
        """
        common = set.intersection(*map(set, seeds.values())) if seeds else set()
        if not common:
            raise ValueError(f"{benchmark}: seeds {sorted(seeds)} have no problem in common")
        kept = {seed: {name: scores[name] for name in scores if name in common} for seed, scores in seeds.items()}
        return cls({benchmark: kept}, {benchmark: 1.0})

    @property
    def seeds(self) -> list[int]:
        """The training seeds that every benchmark has."""
        return sorted(set.intersection(*(set(seeds) for seeds in self.values.values())))

    @property
    def problems(self) -> int:
        return sum(len(next(iter(seeds.values()))) for seeds in self.values.values())

    @property
    def mean(self) -> float:
        """Over benchmarks by their weights; within one over its seeds and problems."""
        return sum(
            weight * fmean(fmean(scores.values()) for scores in self.values[name].values())
            for name, weight in self.weights.items()
        )

    @property
    def standard_error(self) -> float | None:
        """Of the mean, for other problems and another training; None where a benchmark has a single problem.

        Seeds and problems are crossed random effects: every training answers every problem. With y = problem +
        seed + rest, the variance of the mean is V(problem) / P + V(seed) / S + V(rest) / (S P). The components are
        the ANOVA estimates of balanced data (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4);
        negative ones are set to 0. Benchmarks have problems of their own but share the seeds. With one seed this is
        the standard error over problems, and the spread of trainings is not in it.
        """
        seeds = self.seeds
        over_problems, rest = 0.0, 0.0
        for name, weight in self.weights.items():
            table = [list(self._ordered(name, seed)) for seed in seeds]
            if len(table[0]) < 2:
                return None
            of_problems, of_rest = _two_way(table)
            over_problems += weight**2 * max(0.0, of_problems - of_rest)
            rest += weight**2 * of_rest
        if len(seeds) == 1:
            return sqrt(over_problems)
        means = [sum(w * fmean(self._ordered(name, seed)) for name, w in self.weights.items()) for seed in seeds]
        over_seeds = max(0.0, variance(means) / len(seeds) - rest)
        return sqrt(over_seeds + over_problems + rest)

    def _ordered(self, benchmark: str, seed: int) -> list[float]:
        scores = self.values[benchmark][seed]
        return [scores[name] for name in sorted(scores)]

    def minus(self, other: "Scores") -> "Scores":
        """The differences problem by problem, on the benchmarks, seeds and problems that both have.

        Pairs of seeds share nothing but their number unless the trainings do; the error is right either way.

        Raises:
            ValueError: nothing is common to both.
        """
        values = {}
        for name, seeds in self.values.items():
            theirs = other.values.get(name, {})
            pairs = {seed: _difference(seeds[seed], theirs[seed]) for seed in seeds if seed in theirs}
            if any(pairs.values()):
                values |= Scores.of(name, pairs).values
        if not values or not Scores(values, self.weights).seeds:
            raise ValueError(f"no problem under the same seed in both: {_what(self)}; {_what(other)}")
        total = sum(self.weights[name] for name in values)
        return Scores(values, {name: self.weights[name] / total for name in values})


def average(parts: list[Scores]) -> Scores:
    """The mean of scores, each with the same weight, on the seeds that all of them have.

    Parts of one benchmark, such as several windows, share its problems: they are averaged problem by problem first.

    Raises:
        ValueError: no seed, or of a benchmark no problem, that all parts have.
    """
    seeds = set.intersection(*(set(part.seeds) for part in parts))
    if not seeds:
        raise ValueError(f"no seed that all have: {'; '.join(map(_what, parts))}")
    within: dict[str, list[dict[int, dict[str, float]]]] = {}
    weights: Counter = Counter()
    for part in parts:
        for name, weight in part.weights.items():
            within.setdefault(name, []).append(part.values[name])
            weights[name] += weight / len(parts)
    values = {}
    for name, tables in within.items():
        merged = {seed: _mean([table[seed] for table in tables]) for seed in sorted(seeds)}
        values |= Scores.of(name, merged).values
    return Scores(values, dict(weights))


def _two_way(table: list[list[float]]) -> tuple[float, float]:
    """Of seeds x problems: the variances of the mean over problems, whole, and of the rest (0 for one seed)."""
    seeds, problems = len(table), len(table[0])
    by_problem = [fmean(column) for column in zip(*table, strict=True)]
    whole = variance(by_problem) / problems
    if seeds == 1:
        return whole, 0.0
    mean = fmean(by_problem)
    residuals = sum(
        (value - fmean(row) - of_problem + mean) ** 2
        for row in table
        for value, of_problem in zip(row, by_problem, strict=True)
    )
    return whole, residuals / ((seeds - 1) * (problems - 1)) / (seeds * problems)


def _difference(mine: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {name: score - theirs[name] for name, score in mine.items() if name in theirs}


def _mean(tables: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(t[name] for t in tables) for name in tables[0] if all(name in t for t in tables)}


def _what(scores: Scores) -> str:
    return ", ".join(f"{name} seeds {sorted(seeds)}" for name, seeds in scores.values.items())
