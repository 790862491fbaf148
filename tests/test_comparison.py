"""Errors, paired differences and intervals of scores: values worked out by hand, and what must hold for any scores."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte_trl.evaluation.comparison import Scores, average
from pte_trl.evaluation.intervals import interval, interval_of_mean, spread, wilson


def scores(*seeds: list[float], benchmark: str = "b") -> Scores:
    return Scores.of(benchmark, {n: {f"p{i}": x for i, x in enumerate(row)} for n, row in enumerate(seeds)})


shares = st.integers(0, 5).map(lambda right: right / 5)


@st.composite
def tables(draw, count: int = 1):
    """`count` tables of the same numbers of seeds and problems."""
    seeds, problems = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    row = st.lists(shares, min_size=problems, max_size=problems)
    return [scores(*draw(st.lists(row, min_size=seeds, max_size=seeds))) for _ in range(count)]


def test_with_one_seed_the_error_is_that_over_problems():
    one = scores([1, 0.5, 0, 0])
    assert one.mean == 0.375
    assert one.standard_error == pytest.approx(sqrt(0.6875 / 3 / 4))  # squares around 0.375 add up to 0.6875


def test_a_paired_difference_by_hand():
    pte, lora_c = scores([1, 1, 0.5, 0]), scores([0.5, 1, 0, 0])
    difference = pte.minus(lora_c)  # 0.5, 0, 0.5, 0
    assert difference.mean == 0.25
    assert difference.standard_error == pytest.approx(sqrt(0.25 / 3 / 4))
    unpaired = sqrt(pte.standard_error**2 + lora_c.standard_error**2)
    assert difference.standard_error < unpaired  # hard problems are hard for both


def test_pairs_go_by_the_problems_names_and_leave_out_what_one_side_lacks():
    mine = Scores.of("b", {0: {"x": 1.0, "y": 0.0, "z": 1.0}})
    theirs = Scores.of("b", {0: {"z": 0.0, "x": 1.0, "w": 1.0}})
    difference = mine.minus(theirs)
    assert (difference.mean, difference.problems) == (0.5, 2)


def test_what_has_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match=r"no problem under the same seed in both: b seeds \[0\]; c seeds \[0\]"):
        scores([1, 0]).minus(scores([1, 0], benchmark="c"))
    with pytest.raises(ValueError, match="no problem under the same seed in both"):
        scores([1, 0]).minus(Scores.of("b", {7: {"p0": 1.0}}))
    with pytest.raises(ValueError, match=r"b: seeds \[0, 1\] have no problem in common"):
        Scores.of("b", {0: {"x": 1.0}, 1: {"y": 1.0}})
    with pytest.raises(ValueError, match="no seed that all have"):
        average([scores([1, 0]), Scores.of("c", {7: {"p0": 1.0}})])


def test_seeds_and_problems_by_hand():
    # Means of problems 0.75 and 0.25, of seeds the same, residuals 0: variance 0.125 / 2 over each.
    assert scores([1, 0.5], [0.5, 0]).standard_error == pytest.approx(sqrt(0.125 / 2 + 0.125 / 2))
    # Means 0.5 and 0, variance 0.125 / 2 over each; residuals +-0.25, 4 * 0.0625 / 1 / 4 for the rest: all of it.
    assert scores([1, 0], [0, 0]).standard_error == pytest.approx(sqrt(0.0625))
    assert scores([1, 0.5], [0.5, 0.5]).mean == 0.625


def test_a_spread_of_trainings_alone_is_in_the_error():
    # One training solves every problem, the other none: within a training there is no spread.
    assert scores([1, 1, 1], [0, 0, 0]).standard_error == pytest.approx(0.5)  # sd sqrt(0.5) over sqrt(2)


def test_an_average_of_benchmarks_adds_their_errors_in_squares():
    one, two = scores([1, 0.5, 0, 0]), scores([1, 1, 0, 0], benchmark="c")
    both = average([one, two])
    assert both.mean == 0.4375
    assert both.standard_error == pytest.approx(sqrt(one.standard_error**2 + two.standard_error**2) / 2)


def test_an_average_over_windows_keeps_the_problems_together():
    # What is hard at one window is hard at the other, so a second window adds nothing to the evidence.
    one = scores([1, 0.5, 0, 0])
    assert average([one, one]).standard_error == pytest.approx(one.standard_error)
    assert average([one, scores([0, 0.5, 1, 1])]).standard_error == 0


def test_an_average_takes_the_seeds_that_all_have():
    both = average([scores([1, 0], [1, 1]), scores([0, 0], benchmark="c")])
    assert both.seeds == [0] and both.mean == 0.25


def test_a_single_problem_has_no_error():
    assert scores([0.5]).standard_error is None
    assert average([scores([1, 0]), scores([1], benchmark="c")]).standard_error is None


@given(tables(2))
def test_a_difference_is_antisymmetric(pair):
    one, two = pair
    assert one.minus(two).mean == pytest.approx(-two.minus(one).mean, abs=1e-12)
    assert one.minus(two).standard_error == pytest.approx(two.minus(one).standard_error, abs=1e-12)
    assert one.minus(two).mean == pytest.approx(one.mean - two.mean, abs=1e-12)
    assert one.minus(one).mean == one.minus(one).standard_error == 0


@given(tables(1))
def test_the_same_training_twice_is_one_training(table):
    (one,) = table
    first = one.values["b"][0]
    once, twice = Scores.of("b", {0: first}), Scores.of("b", {0: first, 1: first})
    assert twice.standard_error == pytest.approx(once.standard_error, abs=1e-9)


@pytest.mark.parametrize(
    "share, trials, bounds",
    [
        (1.0, 100, (0.963005, 1.0)),  # 1 / (1 + z^2 / n)
        (0.0, 100, (0.0, 0.036995)),
        (0.5, 10, (0.236593, 0.763407)),
        (15 / 148, 148, (0.062386, 0.160525)),  # Newcombe 1998, table I: 81/263 and 15/148
        (81 / 263, 263, (0.255289, 0.366213)),
    ],
)
def test_wilsons_interval(share, trials, bounds):
    assert wilson(share, trials) == pytest.approx(bounds, abs=2e-4)


@pytest.mark.parametrize("share, trials", [(1.1, 3), (-0.1, 3), (0.5, 0)])
def test_what_is_no_share_is_refused(share, trials):
    with pytest.raises(ValueError, match="allowed are shares from 0 to 1"):
        wilson(share, trials)


@given(st.lists(shares, min_size=1, max_size=8))
def test_an_interval_holds_the_score_and_lies_within_0_and_1(values):
    one = scores(values)
    low, high = interval(one.mean, one.standard_error, one.problems, 5 * one.problems)
    assert 0 <= low <= one.mean <= high <= 1 and low < high


def test_single_samples_give_the_textbooks_interval_and_samples_that_agree_the_same():
    single = scores([1, 1, 1, 0])
    expected = wilson(0.75, 4)
    assert interval(0.75, single.standard_error, 4, 4) == pytest.approx(expected)
    assert interval(0.75, single.standard_error, 4, 20) == pytest.approx(expected)


def test_samples_that_scatter_within_problems_count_for_more_but_at_most_for_all():
    assert interval(0.5, 0.1, 10, 50) == pytest.approx(wilson(0.5, 0.25 * 10 / 9 / 0.01))
    assert interval(0.5, 1e-9, 10, 50) == interval(0.5, 0.0, 10, 50) == wilson(0.5, 50)


def test_where_all_is_right_or_wrong_problems_are_the_trials():
    assert interval(1.0, 0.0, 40, 200) == wilson(1.0, 40)
    assert interval(0.0, None, 1, 5) == wilson(0.0, 1)


def test_an_interval_of_a_mean():
    low, high = interval_of_mean([1.0, 0.5], [(0.9, 1.0), (0.3, 0.8)], [0.5, 0.5])
    assert (low, high) == pytest.approx((0.75 - sqrt(0.01 + 0.04) / 2, 0.75 + 0.15))


def test_an_interval_stands_where_the_error_would_be_0():
    assert spread(2.24, (1, 2), "{:.1f}".format) == "±2.2"
    assert spread(0.0, (96.3, 100), "{:.1f}".format) == "[96.3, 100]"
    assert spread(None, (0, 79.3), "{:.1f}".format) == "[0, 79.3]"
    assert spread(None, None, "{:.1f}".format) == ""
