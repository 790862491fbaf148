"""Which samples of a rollout are scored together: those of one W, as far as the sizes allow.

TRL shuffles a rollout and cuts it into micro-batches. Where W follows from the prompt or is drawn, each of them would
have several W: the replay pads every sample to the most evictions and to the largest E of its micro-batch, and
segments run once for each schedule. So samples are put in the order of their W first. A micro-batch then holds
completions of one prompt, or of prompts of like length, as the paper's window ("the longest question of the
micro-batch") has it, or of like draws.

Where one optimizer step trains on the whole rollout, its gradient is the same, except under `loss_type: bnpo`, which
divides by the tokens of a micro-batch. Where several steps share a rollout, a sample may move to another of them;
TRL's shuffling moves samples between them, too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pte_trl.compat.trl import micro_batches_of, replace_micro_batches


def prepared_by_window(trainer, prepare: Callable[[dict], dict], generation_batch: dict) -> dict:
    """The micro-batch that `prepare`, TRL's `_prepare_inputs`, gives; those of a new rollout are sorted by W first."""
    before = micro_batches_of(trainer)
    inputs, found = prepare(generation_batch), micro_batches_of(trainer)
    if found is before or not trainer.bounded:
        return inputs
    return replace_micro_batches(trainer, by_window(found))


def by_window(micro_batches: list[dict]) -> list[dict]:
    """The same samples in as many micro-batches, sorted by W, then by E; the micro-batches are in random order.

    With one schedule for all they are left as they are.

    Args:
        micro_batches: tensors, (batch, ...) or without a dimension, and lists by name; None where there is nothing.
    """
    windows, evicts = torch.cat([batch["schedules"] for batch in micro_batches]).unbind(1)
    keys = windows * (windows.max() + 1) + evicts  # E <= W
    if bool((keys == keys[0]).all()):
        return micro_batches
    whole = {key: joined([batch[key] for batch in micro_batches]) for key in micro_batches[0]}
    order = keys.argsort(stable=True).view(len(micro_batches), -1)
    return [
        {key: rows_of(values, order[place]) for key, values in whole.items()}
        for place in torch.randperm(len(micro_batches)).tolist()
    ]


def joined(parts: list):
    """What several micro-batches have under one key, as one."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts) if parts[0].ndim else parts[0]
    return parts[0] if parts[0] is None else [value for part in parts for value in part]


def rows_of(values, rows: Tensor):
    """Of a tensor or list those of some samples; a number or None is for all."""
    if isinstance(values, Tensor):
        return values[rows] if values.ndim else values
    return values if values is None else [values[row] for row in rows.tolist()]
