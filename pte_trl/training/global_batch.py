"""The global batch: completions per optimizer step over all processes, the same on any number of them."""

import os


def accumulation_steps(global_batch: int, per_device: int, processes: int) -> int:
    """Micro-batches that every process accumulates for an optimizer step of `global_batch` completions.

    Args:
        per_device: completions of a micro-batch (`per_device_train_batch_size`).

    Raises:
        ValueError: the processes cannot share them equally.
    """
    at_once = per_device * processes
    if global_batch % at_once:
        raise ValueError(
            f"global_batch={global_batch}: {processes} processes with per_device_train_batch_size={per_device} take "
            f"{at_once} completions at once; allowed are multiples of {at_once}"
        )
    return global_batch // at_once


def set_accumulation(args) -> None:
    """Sets `gradient_accumulation_steps`: as given, or from `global_batch`, or 1.

    Called before TRL computes its generation batch with it, and so before the processes know of each other: the
    launcher's variable says how many there are. `check_launch` compares it with what really runs.

    Args:
        args: a trainer's config.

    Raises:
        ValueError: the processes cannot share the batch, or both keys are given and do not agree.
    """
    given = args.gradient_accumulation_steps
    if args.global_batch is None:
        args.gradient_accumulation_steps = given or 1
        return
    processes, per_device = int(os.environ.get("WORLD_SIZE", 1)), args.per_device_train_batch_size
    needed = accumulation_steps(args.global_batch, per_device, processes)
    if given not in (None, needed):
        raise ValueError(
            f"global_batch={args.global_batch}, gradient_accumulation_steps={given}: give one of the two, or "
            f"gradient_accumulation_steps={needed}, which {processes} processes with "
            f"per_device_train_batch_size={per_device} need"
        )
    args.gradient_accumulation_steps = needed
