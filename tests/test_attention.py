"""The attentions of a replay against their reference, SDPA with the whole mask at once."""

import copy
import logging
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.counts import Counts
from pte_trl.cache.schedule import Schedule
from pte_trl.replay import flex
from pte_trl.replay.attention import blockwise_attention, by_autograd
from pte_trl.replay.blocks import BLOCK
from pte_trl.replay.plan import ReplayPlan
from tests.grids import grid
from tests.models import (
    ALL_SEVEN,
    chosen,
    decode_logps,
    gap,
    left_padded_batch,
    replay_logps,
    schedules_of,
    tiny,
    with_lora,
    with_pte,
)

LENGTHS, COMPLETION = [9, 4, 6], 3 * BLOCK
WINDOWS = torch.tensor([16, 40, 12])
METHODS = {
    "bare": lambda model: model,
    "lora_c": with_lora,
    "pte": with_pte,
    "pte, all seven": lambda model: with_pte(model, target_modules=ALL_SEVEN),
}


def scored(model, implementation):
    """Log-probs of a batch with mixed windows and padding on both sides, and their gradients."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    ids, mask, prompt = left_padded_batch(LENGTHS, COMPLETION)
    mask[1, -100:] = 0
    logps = replay_logps(model, ids, mask, prompt, WINDOWS)
    kept = mask[:, prompt:].bool()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(chosen(logps, ids, prompt)[kept].sum(), parameters)
    return logps[kept].detach(), gradients


# (prompt, completion, windows, heads, kv heads): runs alone, a batch of blocks, one sample and several, a short tail
SHAPES = [
    (9, 30, [16, 5, 8], 4, 2),
    (64, 9 * BLOCK + 40, [100], 2, 2),
    (20, 3 * BLOCK, [1, 40], 4, 1),
    (3 * BLOCK, 20, [7, 300], 2, 1),
    (5, 1, [1], 2, 2),
]


def case(shape, dtype=torch.float64):
    """A plan with padding on both sides; queries, keys and values (batch, heads, length, d); a gradient."""
    prompt, completion, windows, heads, kv_heads = shape
    mask = torch.ones(len(windows), prompt + completion, dtype=torch.long)
    for row in range(len(windows)):
        mask[row, :row] = 0
    mask[1:, -3:] = 0
    plan = ReplayPlan.build(schedules_of(torch.tensor(windows)), prompt, mask)
    size = (len(windows), prompt + completion)
    inputs = [torch.randn(*size, n, 16, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
    return plan, [x.requires_grad_() for x in inputs], torch.randn(*size, heads, 16, dtype=dtype)


def at_once(query, key, value, plan):
    """The reference, (batch, length, heads, d)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=plan.mask()).transpose(1, 2)


def with_gradients(out, inputs, grad):
    return out, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_of_the_blocks(shape):
    """By the fused node and, as devices without its kernels need it, by autograd."""
    plan, inputs, grad = case(shape)
    expected = with_gradients(at_once(*inputs, plan), inputs, grad)
    node = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
    assert "_Blocks" in repr(node.grad_fn) or "_Blocks" in repr(node.grad_fn.next_functions)
    for out in (node, by_autograd(*inputs, plan, 0.0, None).transpose(1, 2)):
        for a, b in zip(with_gradients(out, inputs, grad), expected, strict=True):
            assert gap(a, b) <= 1e-12


def test_gradients_wanted_twice_and_in_part():
    plan, inputs, grad = case(SHAPES[1])
    out = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
    (alone,) = torch.autograd.grad(out, inputs[1], grad, retain_graph=True)
    assert torch.equal(alone, torch.autograd.grad(out, inputs, grad)[1])
    frozen = [inputs[0], *(x.detach() for x in inputs[1:])]
    out = blockwise_attention(SimpleNamespace(), *frozen, None, replay=plan)[0]
    expected = torch.autograd.grad(at_once(*inputs, plan), inputs[0], grad)
    assert gap(*torch.autograd.grad(out, inputs[0], grad), *expected) <= 1e-12


def test_autocast_and_dropout():
    plan, inputs, _ = case(SHAPES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
    assert low.dtype == torch.bfloat16
    assert gap(low.float(), at_once(*inputs, plan)) <= 0.05
    torch.manual_seed(0)
    dropped = blockwise_attention(SimpleNamespace(), *inputs, None, dropout=0.5, replay=plan)[0]
    torch.manual_seed(0)
    assert torch.equal(dropped, by_autograd(*inputs, plan, 0.5, None).transpose(1, 2))
    assert gap(dropped, at_once(*inputs, plan)) > 0.1


def test_traffic_of_the_backward_grows_with_the_length_alone():
    """Bytes that the backward reads and writes per token, W fixed, from 2K to 16K tokens."""
    found = []
    for length in (2048, 4096, 8192, 16384):
        plan, inputs, grad = case((64, length - 64, [128], 2, 1), torch.float32)
        out = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
        with Counts() as counts:
            torch.autograd.grad(out, inputs, grad)
        found.append(counts.bytes.total() / length)
    assert max(found) <= 1.1 * min(found), found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_flex_attention_sees_what_the_blocks_see(shape):
    """On a CPU it runs forward only, uncompiled, and reads the mask alone; the tiles have the next test."""
    plan, inputs, _ = case(shape, torch.float32)
    inputs = [x.detach() for x in inputs]
    expected = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
    out = flex_attention(*inputs, block_mask=flex.tiles(plan), enable_gqa=True).transpose(1, 2)
    assert gap(out, expected) <= 1e-5


@pytest.mark.parametrize("sliding", [None, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tiles_of_flex_attention_cover_the_mask(shape, sliding):
    plan = case(shape)[0] if sliding is None else replace(case(shape)[0], sliding=sliding).of_sliding
    mask, tiles = plan.mask()[:, 0], flex.tiles(plan)
    count = -(-plan.length // flex.TILE)

    def listed(counts, places):
        found = torch.zeros(len(mask), count, count, dtype=torch.bool)
        for at in torch.cartesian_prod(torch.arange(len(mask)), torch.arange(count)).tolist():
            found[*at, places[at[0], 0, at[1], : counts[at[0], 0, at[1]]].long()] = True
        return found

    partly = listed(tiles.kv_num_blocks, tiles.kv_indices)
    wholly = listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    assert not (partly & wholly).any()
    for row, query, key in torch.cartesian_prod(*map(torch.arange, partly.shape)).tolist():
        seen = mask[row, query * flex.TILE :][: flex.TILE, key * flex.TILE :][:, : flex.TILE]
        assert seen.all() or not wholly[row, query, key]
        assert not seen.any() or partly[row, query, key] or wholly[row, query, key]


def test_the_trial_of_flex_attention_saves_nothing_for_the_layer_that_asks(monkeypatch):
    """A checkpointed layer counts what is saved under its hooks, in the first forward and in the second."""
    tried, saved = [], []

    def attention(query, key, value, **kwargs):
        tried.append(torch.is_autocast_enabled("cpu"))
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    monkeypatch.setattr(flex, "compiled", lambda: attention)
    flex.compiles.cache_clear()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x), torch.no_grad(), torch.autocast("cpu"):
        assert flex.compiles(torch.device("cpu"), torch.float32, 2, 1, 16)
    flex.compiles.cache_clear()
    assert tried == [False] and not saved


def test_without_a_gpu_or_a_compiler_flex_attention_is_the_blocks(monkeypatch, caplog):
    plan, inputs, _ = case(SHAPES[1])
    expected = blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0]
    assert torch.equal(flex.flex_blockwise_attention(SimpleNamespace(), *inputs, None, replay=plan)[0], expected)
    monkeypatch.setattr(flex, "compiled", lambda: lambda *args, **kwargs: 1 / 0)
    flex.compiles.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not flex.compiles(torch.device("cpu"), torch.float32, 2, 1, 16)
    flex.compiles.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "attn_implementation='blockwise_flex' does not compile here, 'blockwise' is used instead: "
        "ZeroDivisionError: division by zero"
    ]


@grid(method=METHODS, family=["qwen2", "llama"])
def test_blockwise_equals_the_whole_mask(family, method):
    model = METHODS[method](tiny(family, torch.float64, wide_norms=True))
    (plain, plain_gradients), (fast, fast_gradients) = scored(model, "sdpa"), scored(model, "blockwise")
    assert gap(plain, fast) <= 1e-10
    for a, b in zip(plain_gradients, fast_gradients, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= 1e-8 * a.norm()


@torch.no_grad()
def test_blockwise_replay_equals_the_decode():
    model = with_pte(tiny("llama", torch.float64))
    model.set_attn_implementation("blockwise")
    ids, mask, prompt = left_padded_batch(LENGTHS, 2 * BLOCK)
    assert gap(decode_logps(model, ids, mask, prompt, 24), replay_logps(model, ids, mask, prompt, 24)) <= 1e-9


def test_a_copy_of_a_plan_is_the_plan_without_what_it_keeps():
    """What is kept may be functions, which cannot be pickled."""
    plan = ReplayPlan.build([Schedule(4)], 3, torch.ones(1, 20, dtype=torch.long))
    plan.kept("a function", lambda: lambda: None)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(other.mask(), plan.mask()) and torch.equal(other.users, plan.users)
        assert other.kept("a function", int) == 0


@torch.no_grad()
def test_without_a_plan_it_is_plain_attention():
    model = tiny("qwen2", torch.float64)
    ids, mask, _ = left_padded_batch(LENGTHS, 20)
    logits = []
    for implementation in ("sdpa", "blockwise"):
        model.set_attn_implementation(implementation)
        logits.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    assert torch.equal(*logits)


def test_the_masks_of_the_blocks_are_the_whole_mask_and_grow_with_the_length_alone():
    def plan_of(completion: int):
        _, mask, prompt = left_padded_batch(LENGTHS, completion)
        mask[1, -100:] = 0
        return ReplayPlan.build(schedules_of(WINDOWS), prompt, mask)

    plan = plan_of(4 * BLOCK)
    whole, batch = plan.mask(), len(LENGTHS)
    for group in plan.blocks:
        for block, mask in enumerate(group.mask.unflatten(0, (batch, -1)).unbind(1)):
            start = group.start + block * group.size
            rows = whole[:, :, start : start + group.size]
            keys = [*range(start + group.size)]
            if group.reach is not None:
                keys = [*range(plan.prompt), *range(start + group.size - group.reach, start + group.size)]
            assert torch.equal(rows[..., keys], mask)
            assert rows.sum() == mask.sum(), "something visible lies outside of the block's keys"
    assert [group.start for group in plan.blocks[1:]] == [group.stop for group in plan.blocks[:-1]]
    assert plan.blocks[0].start == 0 and plan.blocks[-1].stop == plan.length
    assert {group.reach is None for group in plan.blocks} == {True, False}
    assert any(group.count > 1 for group in plan.blocks)
    short, long = (sum(block.mask.numel() for block in plan_of(length).blocks) for length in (8 * BLOCK, 16 * BLOCK))
    assert long < 2.1 * short
