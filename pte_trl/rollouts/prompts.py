"""Prompts as a batch: padded on the left, and each distinct one once."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pte_trl.transfer import uploaded


def left_pad(prompt_ids: list[list[int]], pad_token_id: int, device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> (batch, longest) ids and mask, padded on the left."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompt_ids]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return uploaded(ids, torch.device(device)), uploaded(mask, torch.device(device))


def distinct(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts without repetitions, and for each prompt given its index among them."""
    index_of: dict[tuple[int, ...], int] = {}
    prompt_index = [index_of.setdefault(tuple(prompt), len(index_of)) for prompt in prompt_ids]
    return [list(prompt) for prompt in index_of], prompt_index
