"""Prompts as a batch: padded on the left, and each distinct one once."""

import torch
from torch import Tensor


def left_pad(prompt_ids: list[list[int]], pad_token_id: int, device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> (batch, longest) ids and mask, padded on the left."""
    longest = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompt_ids):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def distinct(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts without repetitions, and for each prompt given its index among them."""
    index_of: dict[tuple[int, ...], int] = {}
    prompt_index = [index_of.setdefault(tuple(prompt), len(index_of)) for prompt in prompt_ids]
    return [list(prompt) for prompt in index_of], prompt_index
