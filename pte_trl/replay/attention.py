"""Attention of a replay at the price of what is visible, not of T squared.

Blocks of queries each attend to the prompt and to the thought tokens that any of them sees; the mask within a block
stays exact. It is a transformers attention function, chosen as `attn_implementation="blockwise"`; without a plan (a
decode, an ordinary forward) it is plain SDPA. `attn_implementation="sdpa"` is its reference: the same mask, all
at once.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pte_trl.compat.torch import FUSED_ATTENTION, fused_attention, fused_attention_backward
from pte_trl.replay.plan import ReplayPlan, plan_of
from pte_trl.replay.precision import cast_by_autocast, own_precision

NAME = "blockwise"
# Arguments with which models ask for more than a softmax of masked, scaled products.
SCORED = {
    "s_aux": "attention sinks",
    "softcap": "soft-capped scores",
    "position_bias": "a bias of its own",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


def blockwise_attention(
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
    check_plain(module, kwargs)
    plan = None if replay is None else plan_of(attention_mask, replay)
    if plan is None:
        if query.shape[2] == 1:
            return one_query(query, key, value, attention_mask, dropout, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if plan is replay and kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"attention_mask: a sliding layer (sliding_window={kwargs['sliding_window']}) was given the mask of a "
            "full one; take all arguments of the forward from replay_inputs"
        )
    query, key, value = cast_by_autocast(query, key, value)
    if fused(query, dropout):
        out = _Blocks.apply(query, key, value, plan, scaling)
    else:
        out = by_autograd(query, key, value, plan, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


def check_plain(module: nn.Module, given: dict) -> None:
    """Refuses attention that adds something to the scores, which the kernels here would leave out.

    Args:
        given: further arguments of the attention function.

    Raises:
        ValueError: naming the layer and what it adds.
    """
    for name, what in SCORED.items():
        if given.get(name) is not None:
            raise ValueError(
                f"attn_implementation='blockwise': {type(module).__name__} has {what} ({name}), which this attention "
                "would leave out; allowed for this model is attn_implementation='eager'"
            )


def fused(query: Tensor, dropout: float) -> bool:
    """Whether `_Blocks` has a kernel; the rest goes through `scaled_dot_product_attention` and autograd."""
    if dropout or query.device.type not in FUSED_ATTENTION:
        return False
    # On CUDA rows of 16 bytes, and no float64.
    aligned = query.shape[-1] * query.element_size() % 16 == 0
    return query.device.type == "cpu" or (aligned and query.dtype != torch.float64)


class _Blocks(torch.autograd.Function):
    """All blocks as one node of the graph.

    Autograd would hold the copied keys and values of every block, and add a gradient of full length for each. This
    holds what came in, copies again in the backward, and adds gradients in place.
    """

    @staticmethod
    @own_precision
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, replay: ReplayPlan, scale: float | None) -> Tensor:
        """(batch, heads, length, head_dim) of the queries, with kv heads for the others -> as the queries."""
        shared = query.shape[1] // key.shape[1]
        outs, rests = [], []
        for group, bias in zip(replay.blocks, replay.biases(query.dtype), strict=True):
            inputs = (group.queries(query), group.keys(key, shared), group.keys(value, shared))
            out, *rest = fused_attention(*inputs, bias, scale)
            outs.append(group.joined(out))
            rests.append(rest)
        out = torch.cat([x.transpose(1, 2) for x in outs], dim=1).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, *(x for rest in rests for x in rest))
        ctx.replay, ctx.scale, ctx.shared = replay, scale, shared
        return out

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *rests = ctx.saved_tensors
        groups = ctx.replay.blocks
        each = len(rests) // len(groups)
        pairs = [(x, _wide_zeros(x)) for x in (key, value)]
        queries = []
        for number, (group, bias) in enumerate(zip(groups, ctx.replay.biases(query.dtype), strict=True)):
            inputs = (group.queries(query), *(group.keys(x, ctx.shared) for x in (key, value)))
            rest = rests[number * each : (number + 1) * each]
            found = fused_attention_backward(group.queries(grad), *inputs, bias, ctx.scale, group.queries(out), *rest)
            queries.append(group.joined(found[0]).transpose(1, 2))
            for (_, total), part in zip(pairs, found[1:], strict=True):
                group.add_gradient(total, part)
        keys_values = (total.to(x.dtype).transpose(1, 2) for x, total in pairs)
        return torch.cat(queries, dim=1).transpose(1, 2), *keys_values, None, None


def _wide_zeros(x: Tensor) -> Tensor:
    """(batch, kv heads, length, d) -> zeros (batch, length, kv heads, d), where gradients are added in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format)


def by_autograd(query: Tensor, key: Tensor, value: Tensor, replay: ReplayPlan, dropout: float, scale) -> Tensor:
    """The same by `scaled_dot_product_attention` and autograd: any device, any dtype, and dropout."""
    shared, outs = query.shape[1] // key.shape[1], []
    for group in replay.blocks:
        inputs = (group.queries(query), group.keys(key, shared), group.keys(value, shared))
        out = scaled_dot_product_attention(*inputs, attn_mask=group.mask, dropout_p=dropout, scale=scale)
        outs.append(group.joined(out))
    return torch.cat(outs, dim=2)


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling) -> Tensor:
    """A decoding step: the query heads that share a kv head go as its queries, so that no key is repeated for them."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    if mask is not None and mask.shape[1] != 1:  # each head has a mask of its own
        mask = mask.view(batch, key.shape[1], -1, mask.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, 1, heads, width)


AttentionInterface.register(NAME, blockwise_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
