"""The arithmetic of windows against a brute-force simulation of METHOD's rule, and its properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import ReplayPlan

schedules = st.builds(
    Schedule,
    window=st.integers(1, 40),
    evict_ratio=st.one_of(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0]), st.floats(0.001, 1.0)),
)
lengths = st.integers(0, 120)


def simulate(schedule: Schedule, length: int) -> list[tuple[list[int], int]]:
    """For every thought token fed: what lies in the window just after, and how many evictions came before."""
    kept, evictions, seen = [], 0, []
    for i in range(length):
        if len(kept) == schedule.window:
            del kept[: schedule.evict]
            evictions += 1
        kept.append(i)
        seen.append((list(kept), evictions))
    return seen


@given(schedules, lengths)
def test_formulas_equal_simulation(schedule, length):
    for i, (kept, evictions) in enumerate(simulate(schedule, length)):
        assert schedule.evictions_before(i) == evictions
        assert kept == list(range(schedule.first_visible(i), i + 1))
        assert len(kept) <= schedule.window
        assert i in schedule.decoded_under(evictions)
    assert schedule.evictions(length) == (simulate(schedule, length)[-1][1] if length else 0)


@given(schedules, lengths)
def test_every_thought_token_leaves_at_most_once_and_in_order(schedule, length):
    count = schedule.evictions(length)
    dropped = [i for k in range(1, count + 1) for i in schedule.evicted_by(k)]
    assert dropped == list(range(count * schedule.evict))
    assert all(i < length for i in dropped)


@given(schedules, st.integers(1, 120))
def test_every_token_is_decoded_under_one_state(schedule, length):
    users = [i for k in range(schedule.evictions(length) + 1) for i in schedule.decoded_under(k)]
    assert users[:length] == list(range(length))
    assert users == sorted(set(users))


@given(schedules, st.integers(0, 30))
def test_tokens_are_decoded_after_what_left_and_see_what_stays(schedule, k):
    for i in schedule.decoded_under(k):
        assert schedule.evictions_before(i) == k
        if k:
            assert max(schedule.evicted_by(k)) < schedule.first_visible(i) <= i


@given(schedules, lengths)
def test_chunks_cover_everything_and_cross_no_eviction(schedule, length):
    chunks = schedule.chunks(length)
    assert [i for run in chunks for i in run] == list(range(length))
    for run in chunks:
        assert len({schedule.evictions_before(i) for i in run}) == 1
    # ... and they are the longest such runs
    assert len(chunks) == len({schedule.evictions_before(i) for i in range(length)})


@given(schedules, lengths)
def test_room_ends_at_the_next_eviction(schedule, fed):
    room = schedule.room(fed)
    assert room >= 1
    assert schedule.evictions_before(fed + room - 1) == schedule.evictions_before(fed)
    assert schedule.evictions_before(fed + room) == schedule.evictions_before(fed) + 1


@given(schedules, st.integers(1, 120))
def test_tensors_give_what_integers_give(schedule, length):
    i = torch.arange(length).view(1, -1)
    assert schedule.evictions_before(i).tolist() == [[schedule.evictions_before(t) for t in range(length)]]
    assert schedule.first_visible(i).tolist() == [[schedule.first_visible(t) for t in range(length)]]


@given(schedules)
def test_evicted_tokens_are_the_share_rounded_up(schedule):
    assert 1 <= schedule.evict <= schedule.window
    exact = schedule.evict_ratio * schedule.window
    assert schedule.evict in (math.ceil(exact), math.ceil(exact - 1e-8))


@pytest.mark.parametrize(
    ("window", "ratio", "evict"),
    [
        (30, 0.1, 3),
        (20, 0.15, 3),
        (100, 0.07, 7),
        (768, 0.25, 192),
        (3, 0.25, 1),
        (1, 0.25, 1),
        (7, 1.0, 7),
        (5, 1, 5),
    ],
)
def test_float_traps(window, ratio, evict):
    assert Schedule(window, ratio).evict == evict


def test_window_of_one_sees_itself_only():
    schedule = Schedule(1, 1.0)
    assert [schedule.first_visible(i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert schedule.evictions(5) == 4


def test_whole_window_leaves_at_once():
    schedule = Schedule(4, 1.0)
    assert [schedule.first_visible(i) for i in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_thought_shorter_than_the_window_evicts_nothing():
    schedule = Schedule(8)
    assert schedule.evictions(8) == 0 and schedule.evictions(9) == 1
    assert schedule.chunks(8) == [range(0, 8)]


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "8", None])
def test_bad_window_is_named(window):
    with pytest.raises(ValueError, match="window="):
        Schedule(window)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), True])
def test_bad_ratio_is_named(ratio):
    with pytest.raises(ValueError, match="evict_ratio="):
        Schedule(8, ratio)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 60))
def test_plan_shows_every_sample_its_own_window(windows, prompt, completion):
    length = prompt + completion
    plan = ReplayPlan.build([Schedule(window) for window in windows], prompt, torch.ones(len(windows), length))
    visible = plan.mask()[:, 0]
    for row, window in enumerate(windows):
        schedule = Schedule(window)
        for i, (kept, _) in enumerate(simulate(schedule, completion)):
            seen = visible[row, prompt + i].nonzero().flatten().tolist()
            assert seen == list(range(prompt)) + [prompt + t for t in kept]
        for k in range(plan.count):
            named = [p - prompt for p in plan.evicted[row, k].tolist() if p < length]
            assert named == [t for t in schedule.evicted_by(k + 1) if t < completion]
