"""Attention of a replay at the price of what is visible, not of T squared.

Blocks of queries each attend to the prompt and to the thought tokens that any of them sees; the mask within a block
stays exact. It is a transformers attention function, chosen as `attn_implementation="blockwise"`; without a plan (a
decode, an ordinary forward) it is plain SDPA. `attn_implementation="sdpa"` is its reference: the same mask, all
at once.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pte_trl.compat.transformers import repeat_kv
from pte_trl.replay.plan import Block, ReplayPlan

NAME = "blockwise"


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
    if replay is None:
        if query.shape[2] == 1:
            return one_query(query, key, value, attention_mask, dropout, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    outputs = []
    for block in replay.blocks:

        def seen(x: Tensor, block: Block = block) -> Tensor:
            """Keys or values of the prompt and of the thought tokens from `oldest` on, for every query head."""
            if block.oldest <= replay.prompt:
                x = x[:, :, : block.stop]
            else:
                x = torch.cat([x[:, :, : replay.prompt], x[:, :, block.oldest : block.stop]], 2)
            return repeat_kv(x, module.num_key_value_groups)

        outputs.append(
            scaled_dot_product_attention(
                query[:, :, block.start : block.stop],
                seen(key),
                seen(value),
                attn_mask=block.mask,
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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
