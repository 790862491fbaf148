"""The attention of a replay by PyTorch's FlexAttention: `attn_implementation="blockwise_flex"`, for CUDA.

One compiled kernel goes over the tiles of the mask in which something is visible, and shares kv heads among their
query heads; nothing is copied. The tiles follow from the plan alone. It is used for a replay on CUDA without dropout;
everywhere else, and where it does not compile, `blockwise` does the work, which is also its reference.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.attention import blockwise_attention, check_plain
from pte_trl.replay.plan import ReplayPlan, plan_of
from pte_trl.replay.precision import cast_by_autocast

NAME = "blockwise_flex"
TILE = 128  # queries and keys of a tile
PROBE = 4 * TILE  # tokens of the trial that says whether it compiles
logger = logging.getLogger(__name__)


def flex_blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    replay: ReplayPlan | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (batch, heads, length, head_dim) in, (batch, length, heads, head_dim) out."""
    plan = None if replay is None else plan_of(attention_mask, replay)
    if plan is not None and not dropout and query.is_cuda:
        check_plain(module, kwargs)
        inputs = cast_by_autocast(query, key, value)
        if compiles(inputs[0].device, inputs[0].dtype, query.shape[1], key.shape[1], query.shape[3]):
            mask = plan.kept("tiles", lambda: tiles(plan))
            out = compiled()(*inputs, block_mask=mask, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2).contiguous(), None
    return blockwise_attention(module, query, key, value, attention_mask, dropout, scaling, replay, **kwargs)


@cache
def compiled() -> Callable:
    """FlexAttention is meant to be compiled; as it is it would make all scores."""
    return torch.compile(flex_attention)


@cache
def compiles(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Whether forward and backward compile and run for such heads; if not, the reason is logged, once."""

    def probe() -> None:
        mask = torch.ones(1, PROBE, dtype=torch.long, device=device)
        plan = ReplayPlan.build([Schedule(TILE)], TILE, mask)
        inputs = [
            torch.randn(1, count, PROBE, width, device=device, dtype=dtype, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]
        with torch.cuda.device_of(mask):  # a new thread begins with the first GPU, and kernels run on the current one
            out = compiled()(*inputs, block_mask=tiles(plan), enable_gqa=True)
            torch.autograd.grad(out.sum(), inputs)

    try:
        # In a thread of its own: the layer that asks may be checkpointed, and hooks that save its tensors, as autocast
        # and gradient mode, belong to a thread. The probe's tensors would be counted among the layer's.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(probe).result()
    except torch.OutOfMemoryError:  # says nothing about the compiler, and may succeed another time
        raise
    except Exception as error:  # a compiler raises whatever it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("attn_implementation=%r does not compile here, 'blockwise' is used instead: %s", NAME, reason)
        return False
    return True


def visible(plan: ReplayPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The plan's mask as FlexAttention asks for it: (sample, head, query, key) -> True where seen."""
    first, real = plan.first, plan.real
    fixed = torch.arange(plan.length, device=real.device) < plan.prompt

    def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = fixed[key] | (key >= first[sample, query])
        return (kept & (key <= query) & real[sample, key]) | (key == query)

    return seen


def tiles(plan: ReplayPlan) -> BlockMask:
    """Tiles in which something is visible, and of these the ones in which everything is.

    Computed from the oldest and the newest `first` of every tile of queries: the mask itself is never made.
    """
    count, device = -(-plan.length // TILE), plan.real.device
    rest = count * TILE - plan.length

    def by_tile(x: Tensor, fill) -> Tensor:
        """(batch, length) -> (batch, tiles, TILE)."""
        return nn.functional.pad(x, (0, rest), value=fill).unflatten(1, (count, TILE))

    oldest = by_tile(plan.first, plan.length).amin(2).unsqueeze(2)
    newest = by_tile(plan.first, 0).amax(2).unsqueeze(2)
    real = by_tile(plan.real, False).all(2).unsqueeze(1)
    at = torch.arange(count, device=device)
    begin, end = at * TILE, at * TILE + TILE - 1
    before = at < at.unsqueeze(1)
    some = (before & ((begin < plan.prompt) | (end >= oldest))) | (at == at.unsqueeze(1))
    # Of a tile on the prompt's edge, the part behind it counts.
    whole = before & real & ((end < plan.prompt) | (begin.clamp(min=plan.prompt) >= newest))
    parts = [found.unsqueeze(1) for found in (some & ~whole, some & whole)]
    counts_places = [
        x.to(torch.int32)
        for found in parts
        for x in (found.sum(3), found.int().argsort(dim=3, descending=True, stable=True))
    ]
    return BlockMask.from_kv_blocks(
        *counts_places, BLOCK_SIZE=TILE, mask_mod=visible(plan), seq_lengths=(plan.length, plan.length)
    )


AttentionInterface.register(NAME, flex_blockwise_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
