"""Confidence intervals of shares, for scores whose samples come in clusters and may all be right or all be wrong."""

from math import sqrt
from statistics import NormalDist

Interval = tuple[float, float]


def wilson(share: float, trials: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share of `trials` independent trials, which need not be a whole number.

    It lies within [0, 1], holds `share`, and is not empty at 0 and 1 (Brown, Cai and DasGupta, Interval Estimation for
    a Binomial Proportion, 2001).

    Raises:
        ValueError: a share outside of [0, 1], or no trials.
    """
    if not 0 <= share <= 1 or not trials > 0:
        raise ValueError(f"share={share!r} of trials={trials!r}: allowed are shares from 0 to 1 of more than 0 trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, spread = share + z**2 / (2 * trials), z * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # min and max: rounding must not put the share outside.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def interval(share: float, standard_error: float | None, problems: int, trials: int) -> Interval:
    """Wilson's interval (95 %) of a score whose trials come in clusters, the samples of one problem.

    The number of trials is the effective sample size: that with which independent trials would have this standard
    error (Korn and Graubard, Survey Methodology 24, 1998; with Wilson's interval in Franco, Little, Louis and Slud,
    J. Survey Statistics and Methodology 7, 2019). It is at most `trials`. At 0 and 1 no error can be estimated; then
    it is the number of problems, as if the samples of a problem always agreed.

    Args:
        standard_error: of the share over problems (and seeds); None for a single problem.
        trials: samples of all problems and seeds together.
    """
    if standard_error is None or not 0 < share < 1:
        return wilson(share, problems)
    if standard_error == 0:
        return wilson(share, trials)
    independent = share * (1 - share) * problems / (problems - 1)  # the variance of one trial
    return wilson(share, min(trials, independent / standard_error**2))


def interval_of_mean(shares: list[float], intervals: list[Interval], weights: list[float]) -> Interval:
    """Of a weighted mean of independent shares from their own intervals, by MOVER (Zou and Donner, Statistics in
    Medicine 27, 2008). The weights add up to 1.
    """
    terms = list(zip(shares, intervals, weights, strict=True))
    mean = sum(weight * share for share, _, weight in terms)
    below = sqrt(sum((weight * (share - low)) ** 2 for share, (low, _), weight in terms))
    above = sqrt(sum((weight * (high - share)) ** 2 for share, (_, high), weight in terms))
    return max(0.0, mean - below), min(1.0, mean + above)


def spread(standard_error: float | None, bounds: Interval | None, write) -> str:
    """What stands behind a score: its standard error, or its interval where the samples show none.

    Args:
        write: a number as text.
    """
    if standard_error:
        return f"±{write(standard_error)}"
    if bounds is None:
        return ""
    low, high = (f"{bound:.0f}" if bound in (0, 100) else write(bound) for bound in bounds)
    return f"[{low}, {high}]"
