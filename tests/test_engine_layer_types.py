"""The engine for layers of other types than full attention, against the reference implementation."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import layer_types
from pte_trl.rollouts import compiled, engine, ring_layers
from pte_trl.rollouts.batching import EngineCache, auto_batch_size, row_bytes
from pte_trl.rollouts.engine import Engine
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.ring import RingCache
from pte_trl.rollouts.ring_layers import RingSliding, RingStates, columns
from tests.grids import grid
from tests.layer_type_models import CONFIGS, WINDOW, mixed
from tests.models import with_lora, with_pte
from tests.test_engine import NothingForTheHost, assert_same, sampled

QO = ["q_proj", "o_proj"]
ARMS = {"bare": lambda model: model, "lora_c": with_lora, "pte": lambda model: with_pte(model, target_modules=QO)}
# Longer and shorter than the models' own window; equal ones next to each other and far apart.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12]] * 3 + [[10, 11]] * 2 + [[12, 13, 14]] + [[5, 6, 7, 8, 9, 10, 11, 12]]
WINDOWS = [3, 6, 3, 3, 6, 6, 3]
SEEDS = [*range(len(PROMPTS))]
OPTIONS = {"max_new_tokens": 15, "eos_token_ids": [40, 41, 42, 43]}
SCHEDULES = [Schedule(window) for window in WINDOWS]
SAMPLES = OPTIONS | {"prompts": PROMPTS, "schedules": SCHEDULES, "seeds": SEEDS}
REVERSED = OPTIONS | {"prompts": PROMPTS[::-1], "schedules": SCHEDULES[::-1], "seeds": SEEDS[::-1]}
WITHIN = 2e-5  # routers and recurrent steps compute in float32


@cache
def model_of(family: str, arm: str):
    return ARMS[arm](mixed(family))


@cache
def expected(family: str, arm: str):
    return sampled(model_of(family, arm), reference=True, **SAMPLES)


@grid(family=CONFIGS, arm=ARMS, rows=[3, 4, None], look=[1, 4])
def test_the_engine_is_the_reference_implementation(monkeypatch, family, arm, rows, look):
    """Two rollouts of a kept engine, the second of the same samples in the opposite order."""
    monkeypatch.setitem(engine.SYNC_EVERY, "cpu", look)
    model, plain, kept = model_of(family, arm), expected(family, arm), EngineCache()
    assert_same(sampled(model, batch_size=rows, engine_cache=kept, **SAMPLES), plain, WITHIN)
    before, lists = kept.engine, ("completion_ids", "logprobs", "evictions")
    found = sampled(model, batch_size=rows, engine_cache=kept, **REVERSED)
    assert kept.engine is before
    assert_same(found, replace(plain, **{name: getattr(plain, name)[::-1] for name in lists}), WITHIN)
    evicted = {window for window, evictions in zip(WINDOWS, plain.evictions, strict=True) if evictions}
    lengths = [len(ids) for ids in plain.completion_ids]
    assert evicted == {3, 6} and len(set(lengths)) > 2 and max(lengths) > WINDOW


# ---- faults that must be seen -------------------------------------------------------------------------------------


def not_restored(monkeypatch):
    """Later samples of a prompt begin where an earlier one has ended."""
    monkeypatch.setattr(RingCache, "restore", lambda self, rows, saved: None)


def not_moved(monkeypatch):
    """States stay behind when rows are moved to the front."""
    monkeypatch.setattr(RingStates, "tensors", lambda self: [])


def not_written(monkeypatch):
    """The model gets copies of the states, so that no step changes them."""
    aim = RingStates.aim

    def copies(self, step):
        aim(self, step)
        self.conv_states = {index: x if x is None else x.clone() for index, x in self.conv_states.items()}

    monkeypatch.setattr(RingStates, "aim", copies)


def padding_is_read(monkeypatch):
    """Padded places of a prompt reach the recurrent states."""
    made = engine.prompt_mask

    def without(*args):
        mask = made(*args)
        return mask | {"linear_attention": None, "conv": None} if isinstance(mask, dict) else mask

    monkeypatch.setattr(engine, "prompt_mask", without)


def one_more_is_seen(monkeypatch):
    """A ring of one place more than the model's window."""
    begin = RingSliding.begin

    def larger(self, source, sizes):
        self.sliding_window = source.sliding_window + 1
        begin(self, source, sizes)

    monkeypatch.setattr(RingSliding, "begin", larger)


def one_less_is_seen(monkeypatch):
    """A mask that hides the newest token while the ring is not full."""
    mask = RingCache.mask

    def shifted(self, position, *args):
        return mask(self, (position - 1).clamp(min=0), *args)

    monkeypatch.setattr(RingCache, "mask", shifted)


def prompt_off_by_one(monkeypatch):
    """Prompts lie one place further in their rings."""
    monkeypatch.setattr(ring_layers, "columns", lambda *args: columns(*args).roll(1, dims=1))


FAULTS = {not_restored: ("olmo3", "lfm2", "falcon_h1"), not_moved: ("lfm2",), not_written: ("lfm2",)}
FAULTS |= {padding_is_read: ("lfm2", "falcon_h1"), one_more_is_seen: ("olmo3",), one_less_is_seen: ("gemma3_text",)}
FAULTS |= {prompt_off_by_one: ("olmo3",)}
CELLS = [(plant, family) for plant, families in FAULTS.items() for family in families]


@pytest.mark.parametrize(
    ("plant", "family"),
    [
        pytest.param(plant, family, marks=[] if family == FAULTS[plant][0] else pytest.mark.thorough)
        for plant, family in CELLS
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, plant, family):
    plain = expected(family, "bare")
    plant(monkeypatch)
    rows = len(PROMPTS) if plant is not_moved else 4  # rows are moved when no prompt waits
    found = sampled(model_of(family, "bare"), batch_size=rows, **SAMPLES)
    with pytest.raises(AssertionError):
        assert_same(found, plain, WITHIN)


def families(*by_default: str) -> pytest.MarkDecorator:
    """`parametrize` over every family; by default over these."""
    marks = [[] if family in by_default else pytest.mark.thorough for family in CONFIGS]
    return pytest.mark.parametrize("family", [pytest.param(f, marks=m) for f, m in zip(CONFIGS, marks, strict=True)])


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 16])
def test_where_a_prompt_lies_in_a_ring(size):
    """Token i at i mod size, the last ones, of prompts padded on the left; all of them kept, or the last few."""
    prompts = [[*range(100, 100 + length)] for length in (1, 3, 4, 5, 6, 11)]
    tokens, mask = left_pad(prompts, 0, "cpu")
    for kept in {11, min(11, max(1, size - 1)), min(11, size)}:
        index = columns(mask.sum(1), kept, size, size)
        assert index.min() >= 0 and index.max() < kept
        rings = tokens[:, -kept:].gather(1, index)
        for prompt, ring in zip(prompts, rings.tolist(), strict=True):
            for number, token in list(enumerate(prompt))[-min(kept, size) :]:
                assert ring[number % size] == token


@families("olmo3", "falcon_h1", "deepseek_v3")
def test_the_bytes_of_a_row_are_those_of_the_buffers(family):
    model, kept = model_of(family, "bare"), EngineCache()
    held = sampled(model, engine_cache=kept, batch_size=3, **SAMPLES | {"max_new_tokens": 4})
    cache = kept.engine.cache
    buffers = [x for layer in cache.layers for x in layer.tensors()]
    assert {len(x) for x in buffers} == {3}
    assert row_bytes(model, cache.places, cache.sizes.tokens) == sum(x[0].nbytes for x in buffers) == held.cache_bytes
    assert auto_batch_size(model, cache.places, free=int(10 * held.cache_bytes), tokens=cache.sizes.tokens) == 6
    # A sliding layer has no more places than its window; a recurrent one has none.
    kinds = layer_types(model.config)
    assert [layer.size for layer in cache.layers if isinstance(layer, RingSliding)] == [WINDOW] * sum(
        kind in ("sliding_attention", "chunked_attention") for kind in kinds
    )


def test_a_ring_is_no_longer_than_a_row_gets():
    kept = EngineCache()
    model = mixed("olmo3", sliding_window=4096)
    options = SAMPLES | {"max_new_tokens": 9}
    assert_same(sampled(model, engine_cache=kept, **options), sampled(model, reference=True, **options), WITHIN)
    assert kept.engine.cache.sliding.size == 32, "8 + 9 tokens, rounded up"
    room = dict.fromkeys(("rows", "places", "evict"), 1)
    assert [kept.engine.cache.has_room(**room, tokens=tokens) for tokens in (32, 33)] == [True, False]
    sampled(model_of("olmo3", "bare"), engine_cache=kept, **options)
    assert kept.engine.cache.sliding.size == WINDOW and kept.engine.cache.has_room(**room, tokens=10**6)


@families("falcon_h1")
def test_what_a_row_has_left_does_not_come_back(family):
    """NaN in every buffer that decoding writes over."""
    model, kept = model_of(family, "bare"), EngineCache()
    options = SAMPLES | {"batch_size": 4, "engine_cache": kept}
    before = sampled(model, **options)
    for buffer in kept.engine.cache.overwritten():
        buffer.fill_(torch.nan)
    assert_same(sampled(model, **options), before)


def test_prompts_are_prefilled_once_and_their_states_are_kept_no_longer_than_needed(monkeypatch):
    model, fed, most = model_of("lfm2", "bare"), [], []
    forward, start = model.forward, Engine._start_samples

    def counted(self, rows):
        start(self, rows)
        most.append(len(self.saved))

    monkeypatch.setattr(model, "forward", lambda **call: fed.append(call["input_ids"].shape[1]) or forward(**call))
    monkeypatch.setattr(Engine, "_start_samples", counted)
    sampled(model, [[5, 6, 7]] * 6 + [[8, 9]] * 6, batch_size=4)
    assert sorted(length for length in fed if length > 1) == [2, 3]
    assert max(most) <= 2 and most[-1] == 0


@families()
def test_no_step_waits_and_buffers_stay_where_they_are(monkeypatch, family):
    where = set()

    def watched(step):
        def call(self, *key):
            where.add(tuple(x.data_ptr() for layer in self.cache.layers for x in layer.tensors()))
            with NothingForTheHost():
                return step(self, *key)

        return call

    for name in ("_feed", "_drop"):
        monkeypatch.setattr(Engine, name, watched(getattr(Engine, name)))
    model, kept = model_of(family, "bare"), EngineCache()
    for samples in (SAMPLES, REVERSED):
        sampled(model, batch_size=4, engine_cache=kept, **samples | {"max_new_tokens": 9})
    assert len(where) == 1


def test_steps_that_are_not_compiled_are_printed_once(capsys):
    """Every architecture has a reason of its own; the same one is printed once for any number of engines."""
    compiled.say.cache_clear()
    families, options = ("gemma3_text", "qwen2", "lfm2"), {"max_new_tokens": 4, "prompts": PROMPTS[-1:]}
    for family in families:
        model = model_of(family, "bare")
        for _ in range(2):
            assert_same(sampled(model, compile="always", **options), sampled(model, compile="never", **options))
    sentences = re.findall(
        "rollout: decode steps are not compiled but eager: Unsupported: (.*)", capsys.readouterr().out
    )
    assert len(sentences) == len(set(sentences)) == len(families)
