"""Models whose layers differ: sliding, recurrent and hybrid layers beside full attention under the bounded cache."""

import copy
from functools import cache as made_once

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from pte_trl.cache import BoundedCache, feed
from pte_trl.cache.bounded import BoundedLayer
from pte_trl.cache.eviction import STRATEGIES, make_cache
from pte_trl.cache.layers import HybridLayer, RecurrentLayer, SlidingLayer, copied, held, hold
from pte_trl.cache.masks import mask_for, prompt_mask
from pte_trl.cache.pieces import takes_up_states
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.attention import blockwise_attention
from pte_trl.replay.plan import ReplayPlan, replay_inputs
from pte_trl.rollouts.reference import Batch
from tests.models import VOCAB, chosen, decode_logps, gap, left_padded_batch, replay_logps, tiny

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 512}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 4}
# Family -> what its configuration needs besides SHAPE. A chunk of a recurrent layer is shorter than the prompt.
FAMILIES = {
    "gemma3_text": SLIDING,
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "shared_expert_intermediate_size": 24,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma2": SLIDING,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 5},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        **{"attention_chunk_size": 6, "num_local_experts": 4, "no_rope_layers": [1, 0, 1]},
    },
}
APART = {
    "jamba": {
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        **{"mamba_d_state": 8, "num_experts": 4},
    },
}
EAGER = ("gpt_oss", "gemma2")  # sinks, soft-capped scores
FLOAT32 = EAGER  # gpt_oss computes in it, and an eager float64 mask of gemma2 overflows there
SLIDES = ("gemma3_text", "olmo3", "cohere2", "gpt_oss")
RECURS = ("qwen3_next", "falcon_h1", "bamba", "lfm2")
MAIN = (*SLIDES, *RECURS)
WINDOW, COMPLETION = 8, 25
CLOSE = 1e-9
CLOSE_FLOAT32 = 1e-4  # of log-probs around 50
WRONG = 0.01


@pytest.fixture(autouse=True)
def all_in_float64(monkeypatch, request):
    """Parts of a model that would compute in float32 do it in float64, where the model has this precision."""
    if getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("family") in FLOAT32:
        return
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wide_to(x, *args, **kwargs):
        if x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return x
        return to(x, *args, **kwargs)

    def wide_softmax(x, *args, **kwargs):
        return softmax(x, *args, **{**kwargs, "dtype": torch.promote_types(x.dtype, kwargs.get("dtype") or x.dtype)})

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)


def close(family: str) -> float:
    return CLOSE_FLOAT32 if family in FLOAT32 else CLOSE


def usual(of: tuple[str, ...], *names: str) -> pytest.MarkDecorator:
    """`parametrize` over families; those that are not named run with `make test-all`."""
    cells = [pytest.param(name, marks=() if name in names else pytest.mark.thorough) for name in of]
    return pytest.mark.parametrize("family", cells)


@made_once
def model_of(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | (FAMILIES | APART)[family])
    attention = "eager" if family in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    model = model.to(torch.float32 if family in FLOAT32 else torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 0.15)
    return model


def batch():
    """Prompts padded on the left, a completion padded on the right."""
    ids, mask, prompt = left_padded_batch([9, 4], COMPLETION)
    mask[1, -4:] = 0
    return ids, mask, prompt


@made_once
def decoded(family: str):
    """(batch, completion, vocabulary) log-probs of feeding token by token."""
    ids, mask, prompt = batch()
    with torch.no_grad():
        return decode_logps(model_of(family), ids, mask, prompt, WINDOW)


def apart(family: str, logps: torch.Tensor) -> float:
    """The largest difference from the decode, padding aside."""
    _, mask, prompt = batch()
    real = mask[:, prompt:].bool()
    return gap(logps[real], decoded(family)[real])


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


# ---- masks and blocks ---------------------------------------------------------------------------------------------


@usual(MAIN, "gpt_oss", "falcon_h1", "lfm2")
def test_masks_of_a_padded_prompt(family):
    """By the type of a layer, as the model makes them, where a query is a token."""
    _, mask, prompt = batch()
    real = mask[:, :prompt]
    masks = prompt_mask(model_of(family), real)
    assert masks.keys() >= set(model_of(family).config.layer_types)
    assert torch.equal(masks["linear_attention"], real)
    at = torch.arange(prompt)
    seen = real.bool()[:, None, None] & (at <= at[:, None])
    wanted = {"full_attention": seen, "sliding_attention": seen & (at > at[:, None] - 5)}
    for name in wanted.keys() & masks.keys():
        expected = mask_for(model_of(family), wanted[name] | (at == at[:, None]))
        assert torch.equal(masks[name], expected)
    assert prompt_mask(model_of(family), torch.ones_like(real)) is None


@pytest.mark.parametrize("sliding", [1, 5, 40, 1000])
def test_blocks_of_a_sliding_layer(sliding):
    """Outputs and gradients where blocks begin to forget, against SDPA with the whole mask."""
    mask = torch.ones(2, 3 * 128 + 40, dtype=torch.long)
    mask[1, :3] = mask[1, -5:] = 0
    plan = ReplayPlan.build([Schedule(16)] * 2, 20, mask, sliding)
    inputs = [torch.randn(2, n, mask.shape[1], 16, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    at = torch.arange(mask.shape[1])
    seen = mask.bool()[:, None, None] & (at <= at[:, None]) & (at > at[:, None] - sliding) | (at == at[:, None])
    key, value = (x.repeat_interleave(2, dim=1) for x in inputs[1:])
    expected = scaled_dot_product_attention(inputs[0], key, value, attn_mask=seen).transpose(1, 2)
    out, _ = blockwise_attention(None, *inputs, plan.real[:, None, None][:, :, :0], replay=plan)
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        assert gap(a, b) <= 1e-12
    assert gap(out, expected) <= 1e-12
    assert torch.equal(plan.of_sliding.mask(), seen)


@pytest.mark.parametrize("implementation", ["blockwise", pytest.param("blockwise_flex", marks=pytest.mark.thorough)])
@usual(
    ("gemma3_text", "olmo3", "cohere2", "qwen3_next", "falcon_h1", "llama4_text"), "olmo3", "falcon_h1", "llama4_text"
)
@torch.no_grad()
def test_blockwise_attention_of_mixed_models(family, implementation):
    ids, mask, prompt = batch()
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation(implementation)
    assert apart(family, replay_logps(model, ids, mask, prompt, WINDOW)) <= close(family)
    assert apart(family, decode_logps(model, ids, mask, prompt, WINDOW)) <= close(family)
    inputs = replay_inputs(model, mask, prompt, Schedule(WINDOW))
    if family in SLIDES:
        inputs["attention_mask"] = inputs["attention_mask"]["full_attention"]
        with pytest.raises(ValueError, match=r"sliding layer \(sliding_window=5\) was given the mask of a full one"):
            model(input_ids=ids, **inputs)


@pytest.mark.parametrize("implementation", ["blockwise", "blockwise_flex"])
@pytest.mark.parametrize(("family", "what"), [("gpt_oss", "attention sinks"), ("gemma2", "soft-capped scores")])
@torch.no_grad()
def test_blockwise_attention_refuses_what_it_would_leave_out(family, what, implementation):
    ids, mask, prompt = batch()
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation(implementation)
    for view in (decode_logps, replay_logps):
        with pytest.raises(ValueError, match=rf"Attention has {what} .*allowed for this model is attn_impl.*='eager'"):
            view(model, ids, mask, prompt, WINDOW)
