"""The blockwise attention of a replay against its plain twin, SDPA with the whole mask at once."""

import torch

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

LENGTHS, COMPLETION = [9, 4, 6], 4 * BLOCK
WINDOWS = torch.tensor([16, 40, 7])
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

    plan = plan_of(COMPLETION)
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
