"""A rollout in parts that fit in memory: of a given size, or reckoned from the cache and halved where that fails."""

from dataclasses import replace

import torch
from torch import nn

from pte_trl.adapter.model import geometry_of
from pte_trl.rollout import Rollout, rollout

SHARE = 0.6  # of the free memory for the cache; the rest is for activations and logits


def cache_bytes(config, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sample that keeps so many tokens; S is small beside them."""
    shape = geometry_of(config)
    heads = shape["num_hidden_layers"] * shape["num_key_value_heads"]
    return 2 * heads * shape["head_dim"] * tokens * dtype.itemsize


def auto_batch_size(model: nn.Module, tokens: int, free: int | None = None) -> int | None:
    """Samples whose caches of so many tokens fit in SHARE of the free memory; None (all at once) on a CPU.

    Args:
        free: bytes; those that the model's GPU has, and torch holds unused, if None.
    """
    if free is None:
        if model.device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused
    return max(1, int(SHARE * free / cache_bytes(model.config, tokens, model.dtype)))


def rollout_in_parts(
    model: nn.Module, prompt_ids: list[list[int]], batch_size: int | str | None, *, window: int, **options
) -> Rollout:
    """`rollout` in parts of at most `batch_size` samples, in their order; all at once for None.

    Args:
        batch_size: a number, None, or "auto" for what the memory allows (`auto_batch_size`).
        window, options: as for `rollout`.

    A part for which the memory does not suffice is halved and tried again, and so are all after it; a single
    sample that does not fit is an error.
    """
    if batch_size == "auto":
        longest = max(map(len, prompt_ids))
        batch_size = auto_batch_size(model, longest + min(window, options["max_new_tokens"]))
    size, at, parts = min(batch_size or len(prompt_ids), len(prompt_ids)), 0, []
    while at < len(prompt_ids):
        try:
            seeds = options.get("seeds")
            some = options | {"seeds": seeds[at : at + size] if seeds else None}
            parts.append(rollout(model, prompt_ids[at : at + size], window=window, **some))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
        else:
            at += size
            continue
        # Behind the handler: the exception holds the frames, and with them the tensors, of what has failed.
        torch.cuda.empty_cache()
        print(f"rollout: out of memory, going on with {size} samples at once", flush=True)
    return join(parts)


def join(parts: list[Rollout]) -> Rollout:
    """Several rollouts of one window as one."""
    count = sum(len(part.completion_ids) for part in parts)
    return replace(
        parts[0],
        completion_ids=[ids for part in parts for ids in part.completion_ids],
        logprobs=[logps for part in parts for logps in part.logprobs],
        evictions=[number for part in parts for number in part.evictions],
        cache_bytes=sum(part.cache_bytes * len(part.completion_ids) for part in parts) / count,
        seconds=sum(part.seconds for part in parts),
    )
