"""Each strategy by itself: what it keeps against a naive simulation, and how it spreads the budget.

The keys and queries of the first layer do not depend on evictions. So its attention under any set of kept entries is
the full attention matrix, cut to them and divided by what is left: enough to simulate a strategy with Python sets.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte_trl.cache.eviction import H2O, HeadKV, PyramidKV, load_importance, measure_importance, save_importance
from pte_trl.cache.eviction.attention import attention_implementation
from pte_trl.cache.eviction.importance import needles
from pte_trl.cache.eviction.observation import ObservationWindow
from pte_trl.cache.eviction.strategy import apportion
from pte_trl.cache.schedule import Schedule
from tests.models import left_padded_batch, tiny
from tests.test_eviction import decode, selective

H2O_KNOBS = [(12, 0.25, 0.5), (13, 0.1, 0.5), (16, 0.25, 0.0), (8, 0.5, 0.3)]
COMPLETION, LENGTHS, LAYERS, HEADS, GROUP = 60, [7, 3, 5], 3, 2, 2


@torch.no_grad()
def first_layer(strategy, window, ratio):
    """(sets of kept thoughts [row][head], layer, full attention (batch, heads, T, T)) after a decode."""
    model, (ids, mask, prompt) = tiny("llama", torch.float32), left_padded_batch(LENGTHS, COMPLETION)
    cache = selective(model, strategy, window, ratio)
    decode(model, ids, mask, prompt, cache)
    with attention_implementation(model, "eager"):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    layer = cache.layers[0]
    kept = [
        [set(layer.thought[row][layer.alive[row, head]].tolist()) for head in range(HEADS)]
        for row in range(len(LENGTHS))
    ]
    latest = set(range(COMPLETION - len(kept[0][0]), COMPLETION))
    assert any(entries != latest for row in kept for entries in row)  # not what a sliding window keeps
    return kept, layer, full.attentions[0], prompt


def simulate(attention, head, prompt, capacity, ratio, leaves):
    """Kept thoughts of one row and kv head, and every thought token's attention to what was kept: {i: {j: prob}}."""
    evict, kept, given = Schedule(capacity, ratio).evict, [], {}
    for i in range(COMPLETION):
        if len(kept) == capacity:
            for _ in range(evict):
                kept.remove(leaves(kept, given, i))
        kept.append(i)
        seen = list(range(prompt)) + [prompt + j for j in kept]
        probs = [attention[h, prompt + i, seen] for h in range(head * GROUP, (head + 1) * GROUP)]
        total = sum(p / p.sum() for p in probs)[prompt:]
        given[i] = dict(zip(kept, total.tolist(), strict=True))
    return set(kept), given


@pytest.mark.parametrize(("window", "ratio", "recent"), H2O_KNOBS)
def test_h2o_keeps_what_accumulated_attention_says(window, ratio, recent):
    def leaves(kept, given, i):
        old = [j for j in kept if j < i - int(recent * window)]
        return min(old, key=lambda j: sum(row.get(j, 0.0) for row in given.values()))

    ours, layer, attention, prompt = first_layer(H2O(recent), window, ratio)
    for row in range(len(LENGTHS)):
        for head in range(HEADS):
            kept, given = simulate(attention[row], head, prompt, window, ratio, leaves)
            assert ours[row][head] == kept
            for place in layer.alive[row, head].nonzero().flatten().tolist():
                j = int(layer.thought[row, place])
                accumulated = sum(step.get(j, 0.0) for step in given.values())
                assert layer.past[row, head, 0, place].item() == pytest.approx(accumulated, abs=1e-5)


@pytest.mark.parametrize(("observe", "kernel"), [(4, 1), (4, 5), (8, 7), (1, 3)])
@pytest.mark.parametrize(("window", "ratio"), [(24, 0.25), (12, 0.1)])
def test_observation_window_keeps_what_the_last_queries_say(observe, kernel, window, ratio):
    width = min(observe, window // 2)

    def leaves(kept, given, i):
        # What leaves together is chosen together: a neighbour that leaves with it still counts.
        if queue.get("at") != i:
            old = [j for j in kept if j < i - width]
            score = {j: sum(given[q].get(j, 0.0) for q in range(i - width, i)) for j in old}
            reach = kernel // 2
            pooled = {j: max(score.get(n, 0.0) for n in range(j - reach, j + reach + 1)) for j in old}
            queue.update(at=i, order=sorted(old, key=lambda j: (pooled[j], j)))
        return queue["order"].pop(0)

    ours, _, attention, prompt = first_layer(ObservationWindow(observe, kernel), window, ratio)
    for row in range(len(LENGTHS)):
        for head in range(HEADS):
            queue = {}
            kept, _ = simulate(attention[row], head, prompt, window, ratio, leaves)
            assert ours[row][head] == kept


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=40),
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(0, 40)),
)
def test_apportion(shares, mean, above):
    most = float("inf") if above is None else mean + above
    counts = apportion(torch.tensor(shares, dtype=torch.float64), len(shares) * mean, most).tolist()
    assert sum(counts) == len(shares) * mean and min(counts) >= 1 and max(counts) <= most
    by_share = [count for _, count in sorted(zip(shares, counts, strict=True))]
    assert all(a <= b + (shares.count(s) > 1) for s, a, b in zip(sorted(shares), by_share, by_share[1:]))  # noqa: B905


def test_apportion_leaves_whole_shares_alone():
    shares = torch.tensor([3.0, 7.0, 2.0], dtype=torch.float64)
    assert apportion(shares, 12, 9).tolist() == [3, 7, 2]
    assert apportion(shares, 12, 5).tolist() == [4, 5, 3]  # 2 too many, to the others as 3 to 2


def test_pyramidkv_capacities_are_a_pyramid():
    # W = 264: 8 observed, mean share 256; the last layer gets 256 / 20 = 12.8, the first 512 - 12.8 = 499.2
    rows = PyramidKV().capacities(5, 3, 264)
    assert rows == [[n] * 3 for n in (507, 386, 264, 142, 21)]
    for window in (1, 2, 9, 16, 100, 257):
        for layers in (1, 2, 7, 28):
            column = [row[0] for row in PyramidKV().capacities(layers, 4, window)]
            assert sum(column) == layers * window and column == sorted(column, reverse=True) and column[-1] >= 1


def test_pyramidkv_beta_is_the_steepness():
    assert PyramidKV(beta=1).capacities(4, 1, 100) == [[100]] * 4
    first = [PyramidKV(beta=beta).capacities(4, 1, 100)[0][0] for beta in (1, 1.5, 2, 5, 20)]
    assert first == sorted(set(first))


def test_pyramidkv_gives_no_layer_more_than_the_thought():
    assert PyramidKV().capacities(3, 1, 100, longest=150) == [[150], [100], [50]]
    assert PyramidKV().capacities(3, 1, 100, longest=100) == [[100]] * 3


def test_headkv_capacities_follow_importance():
    # W = 40: 8 observed, mean share 32; half of it, 16, is shared equally, the pool is 16 * 6 = 96
    importance = [[1, 3], [0, 2], [5, 1]]
    assert HeadKV(importance=importance).capacities(3, 2, 40) == [[32, 48], [24, 40], [64, 32]]
    assert HeadKV(importance=[[7 * x for x in row] for row in importance]).capacities(3, 2, 40)[2] == [64, 32]
    assert HeadKV(importance=[[0.0] * 2] * 3).capacities(3, 2, 40) == [[40, 40]] * 3
    spread = [HeadKV(beta=beta, importance=importance).capacities(3, 2, 40)[2][0] for beta in (1, 2, 5, 1e9)]
    assert spread == sorted(spread, reverse=True) and spread[0] == 88 and spread[-1] == 40
    for window in (1, 2, 5, 33):
        for longest in (None, window + 3):
            rows = torch.tensor(HeadKV(beta=1.005, importance=importance).capacities(3, 2, window, longest))
            assert rows.sum() == 6 * window and rows.min() >= 1 and (longest is None or rows.max() <= longest)


@torch.no_grad()
def test_importance_finds_the_head_that_retrieves():
    """One kv head of the first layer is made to attend to equal tokens: its queries are its keys.

    With a huge theta rotary turns only the first pairs of a head, which are left out.
    """
    rotary = {"rope_type": "default", "rope_theta": 1e30}
    model = tiny("llama", torch.float32, vocab_size=5000, head_dim=32, rope_parameters=rotary)
    attention, size = model.model.layers[0].self_attn, 32
    weight = torch.randn(size, 32)
    weight[[0, 1, 2, 16, 17, 18]] = 0
    attention.k_proj.weight[size:] = weight
    attention.q_proj.weight[2 * size :] = weight.repeat(2, 1)
    found = torch.tensor(measure_importance(model))
    assert found.shape == (LAYERS, HEADS)
    planted = found[0, 1].item()
    found[0, 1] = 0
    assert 0.3 < planted <= 1 and planted > 5 * found.max()


@torch.no_grad()
def test_importance_against_one_plain_forward():
    model, hay, needle, trials = tiny("qwen2", torch.float32), 20, 4, 3
    tokens, starts = needles(64, hay, needle, trials, seed=5)
    assert starts == [0, 6, 13] and tokens.shape == (trials, hay + 2 * needle)
    with attention_implementation(model, "eager"):
        attentions = model(input_ids=tokens, output_attentions=True).attentions
    expected = torch.zeros(LAYERS, HEADS)
    for index, attention in enumerate(attentions):
        for trial, start in enumerate(starts):
            assert tokens[trial, start : start + needle].tolist() == tokens[trial, -needle:].tolist()
            for head in range(HEADS * GROUP):
                for row in attention[trial, head, -needle:].tolist():
                    strongest = sorted(range(len(row)), key=lambda j: -row[j])[:needle]
                    mass = sum(row[j] for j in strongest if start <= j < start + needle)
                    expected[index, head // GROUP] += mass / (trials * needle * GROUP)
    assert torch.allclose(torch.tensor(measure_importance(model, hay, needle, trials, seed=5)), expected, atol=1e-6)
    assert expected.min() > 0


def test_importance_file(tmp_path):
    importance, path = [[0.5, 0.25], [0.0, 1.0]], tmp_path / "heads.json"
    save_importance(importance, path)
    assert load_importance(path) == importance == HeadKV(importance=path).importance
    assert HeadKV(importance=str(path)).capacities(2, 2, 40) == HeadKV(importance=importance).capacities(2, 2, 40)
    for wrong in ({"importance": [[1], [1, 2]]}, {"importance": [[-1.0]]}, [[1.0]], {}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"heads\.json: no head importance"):
            load_importance(path)


def test_headkv_measures_once_and_refuses_another_model():
    strategy, model = HeadKV(), tiny()
    with pytest.raises(ValueError, match="call prepare"):
        strategy.capacities(LAYERS, HEADS, 8)
    strategy.prepare(model)
    measured = strategy.importance
    assert measured == measure_importance(model)
    strategy.prepare(tiny("llama"))
    assert strategy.importance is measured
    with pytest.raises(ValueError, match="importance of 3 x 2 heads, but the model has 5 layers of 2 kv heads"):
        selective(tiny(num_hidden_layers=5), strategy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(1.0), "recent=1.0: must be at least 0 and below 1"),
        (lambda: PyramidKV(beta=0.5), "beta=0.5: must be at least 1"),
        (lambda: HeadKV(beta=0.5), "beta=0.5: must be at least 1"),
        (lambda: PyramidKV(observe=0), "observe=0: must be at least 1"),
        (lambda: HeadKV(kernel=4), "kernel=4: must be odd"),
    ],
)
def test_wrong_knobs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
