"""Which attention implementations take an arbitrary mask, and in what form."""

import torch
from torch import Tensor, nn

from pte_trl.compat.transformers import attention_of

MASKED_ATTENTION = ("blockwise", "sdpa", "eager")  # attention implementations that take an arbitrary mask


def config_of(model: nn.Module):
    """The model's configuration, through a wrapper such as DDP."""
    return getattr(model, "config", None) or model.module.config


def mask_for(model: nn.Module, mask: Tensor) -> Tensor:
    """A mask of four dimensions, True where a query sees a key, as the model's attention implementation takes it."""
    if attention_of(config_of(model)) != "eager":
        return mask
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True and -inf elsewhere: made once a step of what attention would convert in every layer.

    Args:
        mask: True where a query sees a key; every query sees one.
        dtype: of the queries.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
