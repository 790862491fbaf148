"""The rollout engine against its reference implementation: rows refilled and moved, engines kept."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts import engine
from pte_trl.rollouts.batching import EngineCache, auto_batch_size, cache_bytes, halving
from pte_trl.rollouts.engine import Engine, Room
from pte_trl.rollouts.ring import aligned
from pte_trl.rollouts.rollout import rollout
from tests.grids import grid
from tests.models import ALL_SEVEN, OPTIONS, tiny, with_lora, with_pte

PROMPTS = [[5, 6, 7, 8, 9]] * 4 + [[10, 11]] * 3 + [[12, 13, 14]] * 2 + [[5, 6, 7, 8, 9]] * 2
MODELS = {
    "bare": lambda model: model,
    "lora_c": with_lora,
    "pte": with_pte,
    "pte, sum, all seven": lambda m: with_pte(m, state_update="sum", target_modules=ALL_SEVEN),
    "pte, nothing encoded": lambda m: with_pte(m, encode_evicted=False),
    "pte, whitened": lambda m: with_pte(m, whiten=True),
    "pte, column, row norm": lambda m: with_pte(m, read="column", normalisation="row"),
    "pte, all options": lambda m: with_pte(m, **OPTIONS["all options"]),
}
THOROUGH = pytest.mark.thorough
ENDS = list(range(40, 46))
POLICY = CachePolicy(6)


def sampled(model, prompts=PROMPTS, policy=POLICY, **changes):
    options = {"max_new_tokens": 30, "eos_token_ids": ENDS, "pad_token_id": 0, "temperature": 0.8}
    return rollout(model, prompts, policy, **options | {"seeds": list(range(len(prompts)))} | changes)


def assert_same(found, expected, within=1e-6):
    assert found.completion_ids == expected.completion_ids
    assert found.evictions == expected.evictions
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=within)


@grid(model=MODELS, rows=[1, 3, 4, None], look=[1, 4])
def test_the_engine_is_the_reference_implementation(monkeypatch, model, rows, look):
    monkeypatch.setitem(engine.SYNC_EVERY, "cpu", look)
    model = MODELS[model](tiny("llama", torch.float64))
    found, plain = sampled(model, batch_size=rows), sampled(model, reference=True)
    assert_same(found, plain)
    assert len(set(map(len, found.completion_ids))) > 4 and max(found.evictions) > 5


@pytest.mark.parametrize(("window", "ratio"), [(1, 0.25), (2, 1.0), (5, 0.3), (7, 0.9), (29, 0.25), (100, 0.25)])
def test_odd_windows(window, ratio):
    model = with_pte(tiny("qwen2", torch.float64))
    options = {"policy": CachePolicy(window, evict_ratio=ratio)}
    assert_same(sampled(model, batch_size=4, **options), sampled(model, reference=True, **options))


# Of the eleven prompts; windows that never fill are among them.
WINDOWS = [1, 9, 4, 4, 13, 100, 1, 4, 9, 13, 1]
BATCHINGS = {"pte": (None, 1, 0.25), "lora_c": (4, 4, 0.25), "pte, whitened": (3, 1, 0.9)}


def cells():
    """Every model with every batching (rows, steps between two looks, evict_ratio); those of BATCHINGS always run."""
    for model in MODELS:
        for batching in BATCHINGS.values():
            always = BATCHINGS.get(model) == batching
            yield pytest.param(model, *batching, marks=[] if always else [pytest.mark.thorough])


@pytest.mark.parametrize(("model", "rows", "look", "ratio"), cells())
def test_rows_of_several_windows_are_the_reference_implementation(monkeypatch, model, rows, look, ratio):
    """The reference implementation decodes the rows of each window for themselves."""
    monkeypatch.setitem(engine.SYNC_EVERY, "cpu", look)
    model = MODELS[model](tiny("llama", torch.float64))
    options = {"schedules": [Schedule(window, ratio) for window in WINDOWS], "eos_token_ids": [40, 41]}
    found, plain = sampled(model, batch_size=rows, **options), sampled(model, reference=True, **options)
    assert found.windows == plain.windows == WINDOWS
    assert_same(found, plain)
    evicted = {window for window, evictions in zip(WINDOWS, found.evictions, strict=True) if evictions}
    assert len(evicted) > 2, "too few evictions to tell windows apart: choose other seeds"


def test_a_row_among_other_windows_is_the_row_alone():
    """On one engine, kept from batch to batch, and on one that a lone prompt has to itself."""
    model, kept = with_pte(tiny("llama", torch.float64), whiten=True), EngineCache()
    schedules, options = [Schedule(window) for window in WINDOWS], {"batch_size": 4, "engine_cache": kept}
    together = sampled(model, schedules=schedules, **options)
    seeds = [*range(len(PROMPTS))][::-1]
    turned = sampled(model, PROMPTS[::-1], schedules=schedules[::-1], seeds=seeds, **options)
    assert turned.completion_ids[::-1] == together.completion_ids and turned.evictions[::-1] == together.evictions
    for at, prompt in enumerate(PROMPTS):
        alone = sampled(model, [prompt], policy=CachePolicy(WINDOWS[at]), seeds=[at])
        assert alone.completion_ids == [together.completion_ids[at]] and alone.evictions == [together.evictions[at]]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[at], abs=1e-6)


def test_a_batch_takes_the_places_of_its_longest_row():
    """Prompts of 5, 2 and 3 tokens under one budget: a wide window lies behind a short prompt."""
    model, kept = tiny("llama"), EngineCache()
    sampled(model, policy=CachePolicy(budget=16), engine_cache=kept)
    assert (kept.engine.cache.places, kept.engine.cache.evict_at_most) == (16, Schedule(16 - 2).evict)
    before = kept.engine
    sampled(model, policy=CachePolicy("auto"), engine_cache=kept)
    assert kept.engine is before and aligned(5 + 5) == 16, "it has room for these, too"
    sampled(model, policy=CachePolicy(15), engine_cache=kept)
    assert kept.engine is not before and kept.engine.cache.places == aligned(5 + 15) == 32


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_attention_implementation(implementation):
    model = with_pte(tiny("qwen2", torch.float32))  # transformers' eager softmax is in float32 and NaN in float64
    model.set_attn_implementation(implementation)
    assert_same(sampled(model, batch_size=4), sampled(model, reference=True), within=1e-4)


def test_completions_of_one_token():
    """Rows are refilled again and again without a step in between: more often than Python may recurse."""
    model = tiny("llama", torch.float32)
    found = sampled(model, [[5, 6]] * 1200, max_new_tokens=1, batch_size=1)
    assert found.completion_ids == sampled(model, [[5, 6]] * 1200, max_new_tokens=1).completion_ids
    assert {len(ids) for ids in found.completion_ids} == {1}


def test_without_seeds_the_twin_draws_the_same_numbers():
    model = with_pte(tiny("llama", torch.float64))
    found, plain = (
        sampled(model, seeds=None, generator=torch.Generator().manual_seed(3), reference=r) for r in (False, True)
    )
    assert_same(found, plain)


@pytest.mark.parametrize("look", [1, 4])
def test_a_prompt_is_prefilled_once_and_no_row_is_idle(monkeypatch, look):
    monkeypatch.setitem(engine.SYNC_EVERY, "cpu", look)
    model, fed = tiny("llama", torch.float32), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **call: fed.append(tuple(call["input_ids"].shape)) or forward(**call))
    prompts = [[5, 6, 7, 8, 9]] * 16 + [[12, 13, 14]] * 16
    result = sampled(model, prompts, batch_size=6)
    assert [shape for shape in fed if shape[1] > 1] == [(1, 5), (1, 3)]
    steps = sum(rows for rows, length in fed if length == 1)
    needed = sum(len(ids) - 1 for ids in result.completion_ids)
    assert needed <= steps <= needed + 12 * 30 / 2 + 32 * look


def test_buffers_are_made_once_and_serve_the_next_batch_with_the_weights_of_then():
    model, engine_cache = with_pte(tiny("llama", torch.float64)), EngineCache()
    first = sampled(model, engine_cache=engine_cache, batch_size=4)
    kept = engine_cache.engine
    places = [x.data_ptr() for layer in kept.cache.layers for x in (*layer.tensors(), layer.queries)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    second = sampled(model, engine_cache=engine_cache, batch_size=4)
    assert engine_cache.engine is kept
    assert places == [x.data_ptr() for layer in kept.cache.layers for x in (*layer.tensors(), layer.queries)]
    assert second.logprobs != first.logprobs
    assert_same(second, sampled(model, reference=True))
    one, other = (sampled(model, [[5]], engine_cache=cache, batch_size=4) for cache in (engine_cache, None))
    assert engine_cache.engine is kept, "it has more rows than are needed"
    assert_same(one, other)
    sampled(model, engine_cache=engine_cache, batch_size=5)
    assert engine_cache.engine is not kept
    with model.disable_adapter():
        assert_same(sampled(model, engine_cache=engine_cache, batch_size=4), sampled(model, reference=True))
    engine_cache.release()
    assert engine_cache.engine is None


class NothingForTheHost(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or a shape depend on data: a capture could not hold it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert not any(word in name for word in self.FORBIDDEN), name
        booleans = name.startswith("index") and [i for i in args[1] if i is not None and i.dtype == torch.bool]
        assert not booleans, f"{name} with a boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "model",
    [
        name if name in ("lora_c", "pte, sum, all seven", "pte, whitened") else pytest.param(name, marks=THOROUGH)
        for name in MODELS
    ],
)
def test_steps_and_evictions_can_be_captured(monkeypatch, model):
    """No step and no eviction asks the device for a number, and what they change stays where it lies."""
    where = set()

    def watched(step):
        def call(self, *key):
            states = (self.ids, self.logps, self.lengths, self.draws, self.token, self.count, self.alive, self.due)
            where.add(tuple(x.data_ptr() for x in (*states, self.cache.seen)))
            with NothingForTheHost():
                return step(self, *key)

        return call

    for name in ("_feed", "_drop"):
        monkeypatch.setattr(Engine, name, watched(getattr(Engine, name)))
    model = MODELS[model](tiny("llama", torch.float64))
    engine_cache = EngineCache()
    for _ in range(2):
        sampled(model, batch_size=4, top_p=0.9, engine_cache=engine_cache)
    assert len(where) == 1


def test_evicted_entries_stay_where_they_are_and_are_not_seen():
    engine_cache = EngineCache()
    sampled(tiny("llama"), [[5, 6, 7]], eos_token_ids=[-1], max_new_tokens=9, engine_cache=engine_cache)
    cache = engine_cache.engine.cache
    # Eight thoughts were fed into a window of six: 0 and 1 have left, and 6 and 7 lie in their places.
    assert cache.places == aligned(3 + 6) == 16
    assert cache.seen[0].tolist() == [True] * 9 + [False] * 7
    sampled(tiny("llama"), [[5, 6, 7]], eos_token_ids=[-1], max_new_tokens=8, engine_cache=engine_cache)
    seen = engine_cache.engine.cache.seen[0]
    assert seen[:9].tolist() == [True] * 4 + [False] + [True] * 4, "7 thoughts: 6 is in the place of 0, 1 has left"


# ---- memory -------------------------------------------------------------------------------------------------------


def test_the_size_follows_from_the_memory_that_is_free():
    model = tiny("llama", torch.float32)
    held = sampled(model, [[1, 2, 3]], eos_token_ids=[-1], max_new_tokens=40)
    one = cache_bytes(model.config, aligned(3 + 6), model.dtype)
    assert one == held.cache_bytes
    places = Room.needed([3, 2], [Schedule(6), Schedule(7)], 40).places
    assert places == Room.needed([3], [Schedule(10**6)], 6).places == 16  # no ring longer than the completion
    assert auto_batch_size(model, places, free=10 * one) == 6
    assert auto_batch_size(model, places, free=0) == 1
    assert auto_batch_size(model, places) is None  # a CPU
    assert_same(sampled(model, batch_size="auto"), sampled(model, reference=True), within=1e-5)


def test_short_memory_halves_the_rows_and_loses_nothing(monkeypatch, capsys):
    model, tried, run, held, before = with_pte(tiny("llama", torch.float64)), [], Engine.run, [], []

    def short(self, *args):
        tried.append(self.cache.rows)
        held.append(weakref.ref(self.cache.seen))
        if self.cache.rows > 2:
            raise torch.OutOfMemoryError("as on a full GPU")
        return run(self, *args)

    monkeypatch.setattr(Engine, "run", short)
    # What is empty by then is what the allocator can give back: the failed engine has to be gone.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: before.append([buffer() for buffer in held]))
    assert_same(sampled(model, batch_size=6), sampled(model, reference=True))
    assert tried == [6, 3, 2]
    assert before == [[None], [None, None]]
    assert "out of memory, continuing with 2 samples" in capsys.readouterr().out


def test_a_single_row_that_does_not_fit_is_an_error(monkeypatch):
    def never(rows):
        raise torch.OutOfMemoryError("as on a full GPU")

    with pytest.raises(torch.OutOfMemoryError):
        halving(never, 4)
