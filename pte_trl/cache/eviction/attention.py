"""Attention over a cache whose kv heads keep different tokens.

A transformers attention function, used for as long as a decode with a `SelectiveCache` lasts. It asks the cache
which entries are alive in which head, and tells it how much attention every entry received. Plain PyTorch, one query
at a time; the prompt, which never leaves, goes through SDPA.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pte_trl.cache.bounded import BoundedCache
from pte_trl.compat.transformers import attention_of

NAME = "selective"


def selective_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    selective: BoundedCache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (batch, heads, length, head_dim) in, (batch, length, heads, head_dim) out."""
    layer = None if selective is None else selective.layer(module.layer_idx)
    if layer is None or layer.fed == 0:
        if layer is not None:
            layer.see_prompt(attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.view(*key.shape[:2], -1, query.shape[-1])  # (batch, kv heads, query heads of each, head_dim)
    scores = grouped @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    probs = scores.masked_fill(~layer.visible().unsqueeze(2), -torch.inf).softmax(-1)
    layer.report(probs.sum(2, keepdim=True))
    return (probs.to(value.dtype) @ value).flatten(1, 2).unsqueeze(1), None


def selective_mask(q_length: int, **kwargs) -> Tensor | None:
    """The prompt's mask; none for a single token, whose mask differs between heads and comes from the cache."""
    return sdpa_mask(q_length=q_length, **kwargs) if q_length > 1 else None


AttentionInterface.register(NAME, selective_attention)
AttentionMaskInterface.register(NAME, selective_mask)


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another attention implementation, its own given back afterwards.

    Raises:
        ValueError: the model does not let its attention be switched.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = attention_of(base.config)
    base.set_attn_implementation(name)
    if attention_of(base.config) != name:
        raise ValueError(
            f"{type(base).__name__}: its attention cannot be switched from {before!r} to {name!r}, which an eviction "
            'strategy needs; allowed for this model is eviction="sliding_window"'
        )
    try:
        yield
    finally:
        base.set_attn_implementation(before)
