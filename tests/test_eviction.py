"""What holds for every eviction strategy: the table is walked, so a new strategy is tested by being in it."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from pte_trl import BoundedCache
from pte_trl.cache.eviction import STRATEGIES, SelectiveCache, attention_for, make_cache
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.rollout import rollout
from tests.grids import grid
from tests.models import ALL_SEVEN, gap, left_padded_batch, start_of, tiny, with_lora, with_pte

WINDOW, COMPLETION, LENGTHS = 8, 40, [7, 3, 5]
LAYERS, HEADS = 3, 2
ARMS = {
    "bare": lambda family: tiny(family),
    "lora": lambda family: with_lora(tiny(family)),
    "pte": lambda family: with_pte(tiny(family), target_modules=ALL_SEVEN),
}


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return STRATEGIES[request.param]()


CELLS = [(arm, family) for arm in ARMS for family in ("llama", "qwen2")]
LESS = [("bare", "llama"), ("pte", "qwen2")]
SHOWN = [pytest.param(cell, marks=() if cell in LESS else pytest.mark.thorough) for cell in CELLS]


@pytest.fixture(params=SHOWN, ids=["-".join(cell) for cell in CELLS])
def model(request):
    arm, family = request.param
    return ARMS[arm](family)


@torch.no_grad()
def decode(model, ids, mask, prompt, cache, watch=lambda t: None):
    """(batch, fed, vocab) logits of tokens fed one by one; `watch(t)` after thought token t."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    with attention_for(model, cache) as extra:
        for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, ids.shape[1])]:
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            logits.append(out.logits[:, -1:])
            if start:
                watch(start - prompt)
    return torch.cat(logits, dim=1)


def selective(model, strategy, window=WINDOW, ratio=0.25, longest=None):
    strategy.prepare(model)
    return SelectiveCache(model.config, strategy, Schedule(window, ratio), longest)


@grid(window=[1, 2, WINDOW, 21], ratio=[0.25, 1.0, 0.05])
def test_never_above_the_budget(strategy, window, ratio):
    model, (ids, mask, prompt) = tiny(), left_padded_batch(LENGTHS, COMPLETION)
    cache = selective(model, strategy, window, ratio)
    assert torch.tensor(cache.capacities).shape == (LAYERS, HEADS)
    assert torch.tensor(cache.capacities).sum() == LAYERS * HEADS * window
    most = []

    def watch(t):
        entries = cache.entries()
        assert (entries <= LAYERS * HEADS * window).all() and (entries == entries[0]).all()
        for layer, row in zip(cache.layers, cache.capacities, strict=True):
            due = [Schedule(capacity, ratio) for capacity in row]
            held = [t + 1 - s.evict * s.evictions_before(t) for s in due]
            assert (
                layer.alive.sum(2).tolist() == [held] * len(LENGTHS)
                and (torch.tensor(held) <= torch.tensor(row)).all()
            )
            assert layer.alive[:, :, -1].all()  # the token just fed
            stored = layer.alive.any(1).sum(1).max()  # nothing is stored that no head has
            assert layer.keys.shape[2] - prompt == layer.alive.shape[2] <= stored + 1
        most.append(int(entries[0]))

    decode(model, ids, mask, prompt, cache, watch)
    assert max(most) >= LAYERS * HEADS * window * 0.7  # the budget is used
    assert cache.evictions == cache.evictions_after(COMPLETION) > 0


def test_prompt_is_never_evicted(strategy, model):
    """The prompt's keys and values lie unchanged in the cache, whatever its padding, as a full cache holds them."""
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    cache, full = selective(model, strategy), DynamicCache(config=model.config)
    decode(model, ids, mask, prompt, cache)
    with torch.no_grad():
        first = mask[:, :prompt]
        positions = (first.cumsum(1) - 1).clamp(min=0)
        model(input_ids=ids[:, :prompt], attention_mask=first, position_ids=positions, past_key_values=full)
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        assert ours.prompt == prompt
        assert gap(ours.keys[:, :, :prompt], theirs.keys) <= 1e-12
        assert gap(ours.values[:, :, :prompt], theirs.values) <= 1e-12
        assert torch.equal(ours.visible()[:, :, :prompt], first.bool().unsqueeze(1).expand(-1, HEADS, -1))


def test_large_window_is_the_full_cache(strategy, model):
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    full = decode(model, ids, mask, prompt, DynamicCache(config=model.config))
    assert (
        gap(decode(model, ids, mask, prompt, selective(model, strategy, COMPLETION, longest=COMPLETION)), full) <= 1e-9
    )
    assert gap(decode(model, ids, mask, prompt, selective(model, strategy)), full) > 1e-3


def test_batch_is_its_samples_alone(strategy, model):
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    together = decode(model, ids, mask, prompt, selective(model, strategy))
    for row, length in enumerate(LENGTHS):
        own = slice(prompt - length, None)
        alone = decode(model, ids[row : row + 1, own], mask[row : row + 1, own], length, selective(model, strategy))
        assert gap(together[row : row + 1], alone) <= 1e-9


@pytest.mark.parametrize("arm", ["pte", *(pytest.param(arm, marks=pytest.mark.thorough) for arm in ("bare", "lora"))])
def test_rollout_of_a_batch_is_its_samples_alone(strategy, arm):
    """Greedy, with an end token that the rows meet at different times."""
    model = ARMS[arm]("qwen2")
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    policy = CachePolicy(WINDOW, eviction=strategy)
    how = {"max_new_tokens": COMPLETION, "pad_token_id": 0, "temperature": 0}
    free = rollout(model, prompts, policy, eos_token_ids=[-1], **how).completion_ids
    ends = {t: [row.index(t) + 1 if t in row else COMPLETION for row in free] for row in free for t in row}
    end = max(ends, key=lambda t: (len(set(ends[t])) > 1, sum(ends[t])))
    together = rollout(model, prompts, policy, eos_token_ids=[end], **how)
    assert len({len(row) for row in together.completion_ids}) > 1 and max(together.evictions) > 5
    for row, prompt in enumerate(prompts):
        alone = rollout(model, [prompt], policy, eos_token_ids=[end], **how)
        assert together.completion_ids[row] == alone.completion_ids[0]
        assert together.logprobs[row] == pytest.approx(alone.logprobs[0], abs=1e-6)  # kept in float32
        assert together.evictions[row] == alone.evictions[0]


@pytest.mark.parametrize("update", ["recursive", "sum"])
def test_every_evicted_entry_is_encoded_once(strategy, update):
    """S of every layer against a recomputation from a log of what was alive before and after every eviction."""
    model = with_pte(tiny(), state_update=update)
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    cache = selective(model, strategy)
    seen, held = [{} for _ in range(LAYERS)], [{} for _ in range(LAYERS)]
    gone = [[] for _ in range(LAYERS)]  # per layer and eviction: {(row, head, thought): entry}

    def watch(t):
        for index, layer in enumerate(cache.layers):
            now = {}
            for row, head, place in layer.alive.nonzero().tolist():
                entry = torch.stack([x[row, head, prompt + place] for x in (layer.keys, layer.values)])
                now[row, head, int(layer.thought[row, place])] = entry
            left = held[index].keys() - now.keys()
            if left:
                gone[index].append({key: held[index][key] for key in left})
            seen[index].update(now)
            held[index] = now

    decode(model, ids, mask, prompt, cache, watch)
    for index, layer in enumerate(cache.layers):
        assert set(seen[index]) == {(r, h, t) for r in range(3) for h in range(HEADS) for t in range(COMPLETION)}
        expected = recomputed_memory(model, index, gone[index])
        assert len(gone[index]) == layer.evicted > 2
        assert gap(layer.accumulator, expected) <= 1e-12
        for (row, head, thought), entry in held[index].items():  # entries that stay are the ones that were fed
            assert torch.equal(entry, seen[index][row, head, thought])


@torch.no_grad()
def recomputed_memory(model, index, evictions):
    """Memory (batch, n_g, r) of one layer: per eviction, one zero-filled row of K_e and V_e per token."""
    attention = model.base_model.model.model.layers[index].self_attn
    encoder = attention.pte_encoder["default"]
    queries, start = start_of(model, attention)
    size = attention.base_layer.head_dim
    memories = []
    for row in range(len(LENGTHS)):
        memory = start
        for event in evictions:
            tokens = sorted({t for r, _, t in event if r == row})
            keys = torch.zeros(len(tokens), HEADS * size, dtype=start.dtype)
            values = torch.zeros_like(keys)
            for (r, head, thought), (key, value) in event.items():
                if r == row:
                    keys[tokens.index(thought), head * size : (head + 1) * size] = key
                    values[tokens.index(thought), head * size : (head + 1) * size] = value
            update = queries @ (keys @ encoder.key_map.weight.T).T @ (values @ encoder.value_map.weight.T)
            memory = encoder.advance(memory, update)
        memories.append(memory)
    return torch.stack(memories)


def test_sliding_window_is_the_bounded_cache(model):
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    plain, ours = BoundedCache(WINDOW), selective(model, STRATEGIES["sliding_window"]())

    def bounded():
        # a mask over what the bounded cache keeps
        logits, positions = [], (mask.cumsum(1) - 1).clamp(min=0)
        for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, ids.shape[1])]:
            kept = plain.layers[0].kept() - prompt + 1 if start else 0
            now = torch.cat([mask[:, :prompt], mask.new_ones(len(LENGTHS), kept)], 1)
            where = {"attention_mask": now, "position_ids": positions[:, start:stop], "past_key_values": plain}
            logits.append(model(input_ids=ids[:, start:stop], **where).logits[:, -1:])
        return torch.cat(logits, 1)

    with torch.no_grad():
        assert gap(bounded(), decode(model, ids, mask, prompt, ours)) <= 1e-12
    assert ours.evictions == plain.evictions > 10
    for a, b in zip(ours.layers, plain.layers, strict=True):
        assert a.alive.all() and gap(a.keys, b.keys) <= 1e-12 and gap(a.values, b.values) <= 1e-12
        assert (a.accumulator is None) == (b.accumulator is None)
        if a.accumulator is not None:
            assert gap(a.accumulator, b.accumulator) <= 1e-12
    assert [ours.evictions_after(n) for n in range(COMPLETION + 1)] == [
        plain.evictions_after(n) for n in range(COMPLETION + 1)
    ]


def test_strategies_differ(model):
    """Every two strategies of the table decode differently, so none falls back to another."""
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    logits = [decode(model, ids, mask, prompt, selective(model, s(), 20)) for s in STRATEGIES.values()]
    for i, one in enumerate(logits):
        assert all(gap(one, other) > 1e-3 for other in logits[:i])


def test_rows_can_be_selected_and_repeated(strategy):
    model, (ids, mask, prompt) = with_pte(tiny()), left_padded_batch(LENGTHS, COMPLETION)
    plain = decode(model, ids, mask, prompt, selective(model, strategy))
    cache = selective(model, strategy)
    half = prompt + COMPLETION // 2
    decode(model, ids[:, :half], mask[:, :half], prompt, cache)
    rows = [2, 0, 0]
    cache.batch_select_indices(torch.tensor(rows))
    with torch.no_grad(), attention_for(model, cache) as extra:
        for t in range(half, ids.shape[1]):
            where = {"attention_mask": mask[rows, : t + 1], "position_ids": (mask.cumsum(1) - 1)[rows, t : t + 1]}
            out = model(input_ids=ids[rows, t : t + 1], past_key_values=cache, **where, **extra)
    assert gap(out.logits[:, -1], plain[rows, -1]) <= 1e-9


def test_reset_makes_the_cache_ready_for_another_batch(strategy):
    model, (ids, mask, prompt) = with_pte(tiny()), left_padded_batch(LENGTHS, COMPLETION)
    cache = selective(model, strategy)
    before = decode(model, ids, mask, prompt, cache)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.nbytes == 0 and cache.evictions == 0
    assert torch.equal(decode(model, ids, mask, prompt, cache), before)


def test_names():
    model = tiny()
    assert type(make_cache(model, Schedule(WINDOW), "sliding_window")) is BoundedCache
    for name, kind in STRATEGIES.items():
        if name != "sliding_window":
            assert type(make_cache(model, Schedule(WINDOW), name).layers[0].strategy) is kind
    with pytest.raises(
        ValueError, match=r"eviction='h20': allowed are 'sliding_window', 'h2o', 'pyramidkv', 'headkv'"
    ):
        make_cache(model, Schedule(WINDOW), "h20")


def test_attention_is_given_back_and_must_be_the_selective_one(strategy):
    model, (ids, mask, prompt) = tiny(), left_padded_batch([5], 3)
    cache, before = selective(model, strategy), model.config._attn_implementation
    decode(model, ids, mask, prompt, cache)
    assert model.config._attn_implementation == before != "selective"
    cache.reset()
    with torch.no_grad(), pytest.raises(RuntimeError, match="attention does not know this cache"):
        for start, stop in [(0, 5), (5, 6), (6, 7)]:
            model(input_ids=ids[:, start:stop], past_key_values=cache)


def test_several_tokens_at_once_are_refused(strategy):
    model, (ids, _, _) = tiny(), left_padded_batch([5], 3)
    cache = selective(model, strategy)
    with torch.no_grad(), attention_for(model, cache) as extra:
        model(input_ids=ids[:, :5], past_key_values=cache, **extra)
        with pytest.raises(ValueError, match="2 thought tokens fed at once"):
            model(input_ids=ids[:, 5:7], past_key_values=cache, **extra)


class RigidAttention(nn.Module):
    """An attention that does not come from transformers' table, by which transformers knows that it cannot switch."""


class Rigid(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = RigidAttention()


def test_model_whose_attention_cannot_be_switched_is_refused(strategy):
    cache = selective(tiny(), strategy)
    model = Rigid(PreTrainedConfig())
    with pytest.raises(ValueError, match="Rigid: its attention cannot be switched"), attention_for(model, cache):
        pass
