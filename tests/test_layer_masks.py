"""Masks and attentions of models whose layers differ."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pte_trl.cache.masks import mask_for, prompt_mask
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.attention import blockwise_attention
from pte_trl.replay.plan import ReplayPlan, replay_inputs
from tests.mixed import (
    MAIN,
    SLIDES,
    WINDOW,
    all_in_float64,  # noqa: F401
    apart,
    batch,
    close,
    model_of,
    usual,
)
from tests.models import decode_logps, gap, replay_logps


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
