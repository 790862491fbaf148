"""Models whose layers differ, under the bounded cache: decode, replay, generate, and what is kept of each layer."""

import copy

import pytest
import torch
from transformers import AutoConfig

from pte_trl.cache import BoundedCache, feed
from pte_trl.cache.bounded import BoundedLayer
from pte_trl.cache.eviction import STRATEGIES, make_cache
from pte_trl.cache.layers import HybridLayer, RecurrentLayer, SlidingLayer, copied, held, hold
from pte_trl.cache.pieces import takes_up_states
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts.reference import Batch
from tests.mixed import (
    CLOSE_FLOAT32,
    COMPLETION,
    FAMILIES,
    MAIN,
    RECURS,
    SLIDES,
    WINDOW,
    WRONG,
    all_in_float64,  # noqa: F401
    apart,
    batch,
    close,
    decoded,
    model_of,
    usual,
)
from tests.models import chosen, decode_logps, gap, replay_logps, tiny

# ---- decode and replay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_replay_is_the_decode(family):
    ids, mask, prompt = batch()
    model = model_of(family)
    assert apart(family, replay_logps(model, ids, mask, prompt, WINDOW)) <= close(family)
    assert apart(family, replay_logps(model, ids, mask, prompt, WINDOW + 1)) > WRONG, "the window does nothing"


@usual(FAMILIES, "olmo3", "bamba", "lfm2", "llama4_text")
@torch.no_grad()
def test_padding_changes_nothing(family):
    """The padded sequence alone, without its padding, decoded and replayed."""
    ids, mask, prompt = batch()
    own, short = mask[1].bool(), int(mask[1, :prompt].sum())
    ids, mask = ids[1:, own], mask[1:, own]
    expected = decoded(family)[1:, : ids.shape[1] - short]
    for view in (decode_logps, replay_logps):
        assert gap(view(model_of(family), ids, mask, short, WINDOW), expected) <= close(family)


@usual(FAMILIES, "olmo3", "qwen3_next", "falcon_h1", "lfm2")
@torch.no_grad()
def test_chunks_are_token_by_token(family):
    ids, mask, prompt = batch()
    assert apart(family, decode_logps(model_of(family), ids, mask, prompt, WINDOW, chunked=True)) <= close(family)
    cache = BoundedCache(WINDOW)
    logits = [feed(model_of(family), cache, ids[:, :prompt], mask[:, :prompt], longest=4)]
    mask = torch.cat([mask[:, :prompt], torch.ones_like(mask[:, prompt:])], dim=1)
    for start, stop in ((0, 3), (3, COMPLETION - 1)):
        now = slice(prompt + start, prompt + stop)
        logits.append(feed(model_of(family), cache, ids[:, now], mask[:, : now.stop], logits_to_keep=0))
    assert apart(family, (torch.cat(logits, dim=1).double() / 0.6).log_softmax(-1)) <= close(family)


@usual(FAMILIES, "gemma3_text", "bamba", "lfm2")
@torch.no_grad()
def test_generate_does_what_the_reference_loop_does(family):
    """A cache made without config gets its layers from the model, in both."""
    model, (ids, mask, prompt) = model_of(family), batch()
    ids, mask = ids[:, :prompt], mask[:, :prompt]
    how = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=BoundedCache(WINDOW), **how)
    loop = Batch(model, BoundedCache(WINDOW), mask)
    logits = [loop.prefill(ids, {})]
    logits += [loop.feed(token, {}) for token in out.sequences[:, prompt:-1].unbind(1)]
    assert gap(torch.stack(logits), torch.stack(out.logits)) <= close(family) * torch.stack(out.logits).abs().max()
    assert loop.cache.evictions == Schedule(WINDOW).evictions(2 * WINDOW - 1) > 0


@usual(FAMILIES, "cohere2", "bamba", "lfm2")
def test_gradients_of_a_replay_are_those_of_the_decode(family):
    """Both paddings; the decode in chunks, since the models' own step of one token writes states in place."""
    ids, mask, prompt = batch()
    model, real = model_of(family), mask[:, prompt:].bool()
    found = []
    for view, how in ((decode_logps, {"chunked": True}), (replay_logps, {})):
        logps = chosen(view(model, ids, mask, prompt, WINDOW, **how), ids, prompt)
        found.append(torch.autograd.grad(logps[real].sum(), list(model.parameters()), allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None]
    assert len(pairs) > 10 and all(gap(a, b) <= close(family) * max(1, a.abs().max()) for a, b in pairs)


@torch.no_grad()
def test_a_model_that_forgets_its_state_in_a_chunk_is_fed_one_by_one():
    """Its layers begin a forward of several tokens from an empty state, in transformers itself."""
    ids, mask, prompt = batch()
    model = model_of("jamba")
    assert not takes_up_states(model) and all(takes_up_states(model_of(family)) for family in RECURS)
    assert apart("jamba", replay_logps(model, ids, mask, prompt, WINDOW)) <= CLOSE_FLOAT32
    assert apart("jamba", decode_logps(model, ids, mask, prompt, WINDOW, chunked=True)) > WRONG
    mask = torch.cat([mask[:, :prompt], torch.ones_like(mask[:, prompt:])], dim=1)
    cache, now = BoundedCache(WINDOW), slice(prompt, ids.shape[1] - 1)
    logits = [feed(model, cache, ids[:, :prompt], mask[:, :prompt])]
    logits.append(feed(model, cache, ids[:, now], mask[:, :-1], logits_to_keep=0))
    assert apart("jamba", (torch.cat(logits, dim=1).double() / 0.6).log_softmax(-1)) <= CLOSE_FLOAT32
    for words, call in (
        (
            r"prefill_chunk_size=4\): recurrent layers of jamba begin each from an empty state",
            feed_prompt_of("jamba", 4),
        ),
        (r"prefill_chunk_size=1\): recurrent layers of lfm2 would take padding for tokens", feed_prompt_of("lfm2", 1)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def feed_prompt_of(family: str, longest: int):
    ids, mask, prompt = batch()
    return lambda: feed(model_of(family), BoundedCache(WINDOW), ids[:, :prompt], mask[:, :prompt], longest=longest)


@torch.no_grad()
def test_turns_of_a_chat():
    """generate feeds a long turn as its model can take it: pieces, or tokens."""
    ids, _, prompt = batch()
    for family in ("lfm2", "jamba", "olmo3"):
        how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        cache, model = BoundedCache(WINDOW), model_of(family)
        model.generate(input_ids=ids[:1, :prompt], past_key_values=cache, **how)
        first = cache.get_seq_length()
        said = model.generate(input_ids=ids[:1, :prompt], past_key_values=BoundedCache(WINDOW), **how).sequences
        turn = torch.cat([said, ids[1:, -20:]], dim=1)
        out = model.generate(input_ids=turn, past_key_values=cache, **how)
        fresh = BoundedCache(WINDOW)
        feed(model, fresh, turn[:, :prompt])
        for at in range(prompt, turn.shape[1]):
            logits = feed(model, fresh, turn[:, at : at + 1])
        assert first == prompt + 3 and cache.evictions > 4
        assert gap(out.logits[0], logits[:, -1]) <= CLOSE_FLOAT32 * logits.abs().max()


# ---- what would be silently wrong ---------------------------------------------------------------------------------


@usual(MAIN, "gemma3_text", "gpt_oss", "falcon_h1", "lfm2")
@torch.no_grad()
def test_one_mask_for_all_layers_is_wrong(family):
    ids, mask, prompt = batch()
    inputs = replay_inputs(model_of(family), mask, prompt, Schedule(WINDOW))
    assert isinstance(inputs["attention_mask"], dict)
    inputs["attention_mask"] = inputs["attention_mask"]["full_attention"]
    logits = model_of(family)(input_ids=ids, **inputs).logits[:, prompt - 1 : -1]
    assert apart(family, (logits.double() / 0.6).log_softmax(-1)) > WRONG


@usual(MAIN, "olmo3", "falcon_h1", "lfm2")
@torch.no_grad()
def test_a_cache_that_knows_nothing_of_the_layers_is_refused(family):
    ids, mask, prompt = batch()
    cache, model = BoundedCache(WINDOW), model_of(family)
    kind = "sliding" if family in SLIDES else "recurrent"
    with pytest.raises(
        ValueError, match=rf"{kind} layers, .* make it by BoundedCache\(window, config=model\.config\)"
    ):
        model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache, use_cache=True)
    for name in sorted(set(STRATEGIES) - {"sliding_window"}):
        with pytest.raises(ValueError, match=f"all attend in full, this {model.config.model_type} has"):
            make_cache(model, Schedule(WINDOW), name)


@usual(SLIDES, "olmo3")
@torch.no_grad()
def test_bounded_layers_in_the_place_of_sliding_ones_are_wrong(family):
    ids, mask, prompt = batch()
    model = model_of(family)
    cache = BoundedCache(WINDOW, config=model.config)
    cache.layers = [BoundedLayer(cache.schedule) for _ in cache.layers]
    logits = [model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache).logits[:, -1:]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for at in range(prompt, ids.shape[1] - 1):
        now = slice(at, at + 1)
        step = {"input_ids": ids[:, now], "attention_mask": mask[:, : at + 1], "position_ids": positions[:, now]}
        logits.append(model(past_key_values=cache, **step).logits)
    assert apart(family, (torch.cat(logits, 1).double() / 0.6).log_softmax(-1)) > WRONG


def test_types_of_layers_that_are_refused():
    for config, words in (
        (AutoConfig.for_model("deepseek_v32"), "layer types deepseek_sparse_attention of this deepseek_v32"),
        (AutoConfig.for_model("olmo3", sliding_window=1), "sliding_window=1 of this olmo3: must be at least 2"),
        (
            AutoConfig.for_model("mistral", sliding_window=4),
            "this mistral has sliding_attention; set sliding_window=null",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            BoundedCache(WINDOW, config=config)


# ---- the cache ----------------------------------------------------------------------------------------------------


def steps(family: str, cache: BoundedCache, ids: torch.Tensor, mask: torch.Tensor, start: int, stop: int):
    """Logits of tokens `start` to `stop` after the prompt, fed one by one; from the prompt on where `start` is 0."""
    prompt = batch()[2]
    mask = torch.cat([mask[:, :prompt], torch.ones_like(mask[:, prompt:])], dim=1)
    if start == 0:
        feed(model_of(family), cache, ids[:, :prompt], mask[:, :prompt])
    found = []
    for at in range(prompt + start, prompt + stop):
        found.append(feed(model_of(family), cache, ids[:, at : at + 1], mask[:, : at + 1]))
    return torch.cat(found, dim=1)


ROWS = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}


@usual(MAIN, "olmo3", "falcon_h1", "lfm2")
@torch.no_grad()
def test_rows_of_all_layers_go_together(family):
    ids, mask, _ = batch()
    first = BoundedCache(WINDOW, config=model_of(family).config)
    steps(family, first, ids, mask, 0, 12)
    whole = steps(family, copy.deepcopy(first), ids, mask, 12, 14)
    for change, rows in ROWS.values():
        cache = copy.deepcopy(first)
        change(cache)
        assert (
            gap(steps(family, cache, ids[rows], mask[rows], 12, 14), whole[rows]) <= close(family) * whole.abs().max()
        )


@usual(MAIN, "olmo3", "falcon_h1", "lfm2")
@torch.no_grad()
def test_a_copied_layer_continues_alone(family):
    """Also what is held, put into a copy, and back from another device as offloading does it."""
    ids, mask, _ = batch()
    cache = BoundedCache(WINDOW, config=model_of(family).config)
    steps(family, cache, ids, mask, 0, 12)
    before = [{name: x.clone() for name, x in held(layer).items()} for layer in cache.layers]
    other = copy.copy(cache)
    other.layers = [copied(layer) for layer in cache.layers]
    expected = steps(family, other, ids, mask, 12, 16)
    for layer, old in zip(cache.layers, before, strict=True):
        assert old and held(layer).keys() == old.keys()
        assert all(torch.equal(x, old[name]) for name, x in held(layer).items())
    for layer, old in zip(cache.layers, before, strict=True):
        for x in held(layer).values():
            x.zero_()
        hold(layer, old)
        layer.offload()
        layer.prefetch()
    assert torch.equal(steps(family, cache, ids, mask, 12, 16), expected)
    size = sum(x.nbytes for layer in cache.layers for x in held(layer).values())
    assert size <= cache.nbytes <= 2 * size


@usual(MAIN, "cohere2", "bamba")
@torch.no_grad()
def test_a_reset_cache_is_a_new_one(family):
    ids, mask, _ = batch()
    cache, fresh = (BoundedCache(WINDOW, config=model_of(family).config) for _ in range(2))
    steps(family, cache, ids, mask, 0, 12)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.evictions == 0
    assert torch.equal(steps(family, cache, ids[1:], mask[1:], 0, 4), steps(family, fresh, ids[1:], mask[1:], 0, 4))


@usual(MAIN, "olmo3", "qwen3_next", "falcon_h1")
def test_a_prompt_of_inference_mode_can_be_trained_on(family):
    ids, mask, prompt = batch()
    cache = BoundedCache(WINDOW, config=model_of(family).config)
    with torch.inference_mode():
        feed(model_of(family), cache, ids[:, :prompt], mask[:, :prompt])
    ones = torch.cat([mask[:, :prompt], torch.ones_like(mask[:, prompt:])], dim=1)
    logits = feed(model_of(family), cache, ids[:, prompt : prompt + 6], ones[:, : prompt + 6], logits_to_keep=0)
    logits.sum().backward()
    model_of(family).zero_grad()


def test_layers_by_type():
    kinds = {
        family: [type(x) for x in BoundedCache(WINDOW, config=model_of(family).config).layers] for family in FAMILIES
    }
    for family in (*SLIDES, "gemma2", "llama4_text"):
        assert kinds[family] == [SlidingLayer, BoundedLayer, SlidingLayer]
    assert kinds["gemma3n_text"] == [SlidingLayer, BoundedLayer], "the last two use the keys of these"
    for family in ("qwen3_next", "bamba", "lfm2"):
        assert kinds[family] == [RecurrentLayer, BoundedLayer, RecurrentLayer]
    assert kinds["falcon_h1"] == [HybridLayer] * 3
    full = BoundedCache(WINDOW, config=tiny().config)
    assert [type(x) for x in full.layers] == [BoundedLayer] * 3 and not full.mixed


def test_tokens_of_another_model_are_refused():
    ids, mask, prompt = batch()
    cache = BoundedCache(WINDOW)
    with torch.no_grad():
        feed(model_of("lfm2"), cache, ids[:, :prompt], mask[:, :prompt])
        with pytest.raises(ValueError, match="holds tokens of a model with other layers than this olmo3 has"):
            feed(model_of("olmo3"), cache, ids[:, prompt:], mask)
        cache.reset()
        feed(model_of("olmo3"), cache, ids[:, :prompt], mask[:, :prompt])
    assert [type(x) for x in cache.layers] == [SlidingLayer, BoundedLayer, SlidingLayer]
