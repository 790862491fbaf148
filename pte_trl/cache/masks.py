"""Which attention implementations take an arbitrary mask, and in what form."""

import torch
from torch import Tensor, nn

from pte_trl.compat.transformers import attention_of

BLOCKWISE = ("blockwise", "blockwise_flex")  # those of `pte_trl.replay`, which read the plan of a replay themselves
MASKED_ATTENTION = (*BLOCKWISE, "sdpa", "eager")  # attention implementations that take an arbitrary mask


def config_of(model: nn.Module):
    """The model's configuration, through a wrapper such as DDP."""
    return getattr(model, "config", None) or model.module.config


def prompt_mask(model: nn.Module, real: Tensor, padded: bool | None = None) -> Tensor | None:
    """The attention mask of a forward over prompts padded on the left; None where nothing is padded.

    A padded query sees itself, as in the replay. With nothing to see its output is the backend's choice, and a NaN
    there would reach every token: as a padded value of the next layer, it is multiplied by 0.

    Args:
        real: (batch, length), 0 where padded.
        padded: whether it has a 0; read from the device if None.

    Returns:
        (batch, 1, length, length), as `mask_for` makes it. Attention that takes no such mask skips padded queries,
        and gets `real`.
    """
    if (attention_of(config_of(model)) or "").startswith(("flash", "flex")):
        return real
    if not (padded if padded is not None else not real.all()):
        return None
    at = torch.arange(real.shape[1], device=real.device)
    query = at.unsqueeze(1)
    return mask_for(model, ((at <= query) & real.bool()[:, None, None]) | (at == query))


def check_mask_taken(model: nn.Module) -> str:
    """The model's attention implementation, which must take an arbitrary mask.

    Raises:
        ValueError: it takes none.
    """
    attention = attention_of(config_of(model))
    if attention not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r}: a replay needs an arbitrary attention mask; "
            f"allowed are {', '.join(map(repr, MASKED_ATTENTION))}"
        )
    return attention


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
