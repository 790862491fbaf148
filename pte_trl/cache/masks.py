"""Attention masks: in what form an attention implementation takes them, and which layer needs which."""

import torch
from torch import Tensor, nn

from pte_trl.compat.transformers import attention_of, is_flash_attention_requested, layer_types_and_sizes

BLOCKWISE = ("blockwise", "blockwise_flex")  # those of `pte_trl.replay`, which read the plan of a replay themselves
MASKED_ATTENTION = (*BLOCKWISE, "sdpa", "eager")  # attention implementations that take an arbitrary mask


def config_of(model: nn.Module):
    """The model's configuration, through a wrapper such as DDP."""
    return getattr(model, "config", None) or model.module.config


def is_mixed(config) -> bool:
    """Whether a model has layers that do not attend in full."""
    return set(layer_types_and_sizes(config)[0]) != {"full_attention"}


def sliding_window_of(config) -> int | None:
    """Tokens that a sliding layer of the model sees, itself included; None if there is no such layer."""
    types, sizes = layer_types_and_sizes(config)
    return sizes["sliding_window"] if {"sliding_attention", "hybrid_sliding"} & set(types) else None


def prompt_mask(
    model: nn.Module, real: Tensor, padded: bool | None = None
) -> Tensor | dict[str, Tensor | None] | None:
    """The attention mask of a forward over prompts padded on the left; None where nothing is padded.

    A padded query sees itself, as in the replay. With nothing to see its output is the backend's choice, and a NaN
    there would reach every token: as a padded value of the next layer, it is multiplied by 0.

    Args:
        real: (batch, length), 0 where padded.
        padded: whether it has a 0; read from the device if None.

    Returns:
        (batch, 1, length, length), as `mask_for` makes it; of a model with other layers as well `masks_by_type`.
        Attention that takes no such mask skips padded queries, and gets `real`.
    """
    if (attention_of(config_of(model)) or "").startswith(("flash", "flex")):
        return real
    if not (padded if padded is not None else not real.all()):
        return None
    query, key = _places(real)
    return masks_by_type(model, real, mask_for(model, _seen(real, key <= query)))


def masks_by_type(
    model: nn.Module, real: Tensor, full: Tensor, sliding: Tensor | None = None
) -> Tensor | dict[str, Tensor | None]:
    """The masks of a forward without a past, as transformers' models take them: one, or one by the type of a layer.

    One mask of four dimensions in all layers would be wrong twice: a sliding layer would look beyond its window, and a
    recurrent layer would take padding for tokens, since it reads two dimensions only.

    Args:
        real: (batch, length), 0 where padded.
        full: of layers that attend in full.
        sliding: of sliding layers, where their attention takes another than the mask of their window.

    Returns:
        `full` where all layers attend in full; otherwise by the name of the layer type, a superset of those in the
        model. A padded query sees itself in all of them.
    """
    config = config_of(model)
    if not is_mixed(config):
        return full
    types, sizes = layer_types_and_sizes(config)
    query, key = _places(real)
    # A hybrid layer asks for its two masks by the names of its parts, or by its own for the attention.
    masks = {"full_attention": full, "hybrid": full, "linear_attention": real, "conv": real, "mlp": None, "moe": None}
    window = sliding_window_of(config)
    if window is not None:
        if sliding is None:
            near = (key <= query) & (key > query - window)
            sliding = mask_for(model, _seen(real, near))
        masks |= {"sliding_attention": sliding, "hybrid_sliding": sliding}
    if "chunked_attention" in types:
        begin = (real.cumsum(1) == 0).sum(1).view(-1, 1, 1, 1)  # chunks are counted from the first token
        size = sizes["sliding_window"]
        near = (key <= query) & ((key - begin) // size == (query - begin) // size)
        masks["chunked_attention"] = mask_for(model, _seen(real, near))
    return masks


def _places(real: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries (length, 1) and of keys (length)."""
    at = torch.arange(real.shape[1], device=real.device)
    return at.unsqueeze(1), at


def _seen(real: Tensor, near: Tensor) -> Tensor:
    """(batch, 1, length, length), True for the tokens that are near, and for every query itself.

    Args:
        real: (batch, length), 0 where padded.
        near: (length, length) or (batch, 1, length, length).
    """
    query, key = _places(real)
    return (near & real.bool()[:, None, None]) | (key == query)


def check_padding_is_seen(config, mask: Tensor | None) -> None:
    """Refuses padding where attention would look for it among the last tokens, though it is among the first.

    Args:
        mask: (batch, tokens), 0 where padded.

    Raises:
        ValueError: the attention implementation is one of flash attention, and something is padded.
    """
    if is_flash_attention_requested(config) and mask is not None and not mask.all():
        raise ValueError(
            f"attn_implementation={attention_of(config)!r}: it would see the padding of a prompt after "
            "an eviction; allowed for padded batches are 'blockwise', 'sdpa' and 'eager'"
        )


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
