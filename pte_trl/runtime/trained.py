"""Refuses to report as trained what was not: a run without a step, an adapter that is not finite or not complete."""

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from pte_trl.compat.engines import zero3_part
from pte_trl.runtime.faults import Fault

# ---- before the weights load -----------------------------------------------------------------------------------


def prompts_per_batch(args) -> int:
    """Distinct prompts that one generation batch takes, over all ranks: as TRL's `RepeatSampler` is given them."""
    if hasattr(args, "generation_batch_size"):
        return args.generation_batch_size // args.num_generations
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_enough(args, prompts: int) -> None:
    """Refuses a training set that does not fill one generation batch: TRL drops what is left over, here all of it.

    Raises:
        ValueError: with both numbers.
    """
    needed = prompts_per_batch(args)
    if prompts < needed:
        raise ValueError(
            f"the training set has {prompts} prompts and a generation batch takes {needed}, so not one step could be "
            "made; more prompts, or a smaller per_device_train_batch_size, gradient_accumulation_steps, global_batch "
            "or steps_per_generation"
        )


# ---- once they are loaded --------------------------------------------------------------------------------------


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, under FSDP and ZeRO-3 too."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    part = zero3_part(parameter)
    return parameter if part is None else part


def first_not_finite(model: nn.Module) -> str | None:
    """The name of a trainable tensor with a NaN or an infinity in this rank's part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(local(parameter)).all():
                return name
    return None


def check_trained(trainer) -> None:
    """Stops before an adapter that is not finite is saved; on every rank where one has such a part.

    Raises:
        Fault: naming the step and a tensor.
    """
    bad = first_not_finite(trainer.model)
    anywhere = torch.tensor(float(bad is not None), device=trainer.args.device)
    if trainer.args.world_size > 1:
        anywhere = reduce(anywhere, "sum")
    if anywhere.item():
        raise Fault(
            f"step {trainer.state.global_step}, rank {trainer.args.process_index}: the adapter is not finite"
            f"{f', first in {bad}' if bad else ' on another rank'}, so nothing is saved; resume from "
            f"the last complete checkpoint with a smaller learning_rate (it was {trainer.args.learning_rate:g})"
        )


def check_finished(trainer) -> None:
    """Refuses to call a run finished that made no step, or fewer than were asked for, or made the adapter not finite.

    Raises:
        Fault: saying how many there were.
    """
    done, asked = trainer.state.global_step, trainer.args.max_steps
    if done < max(1, asked) and not trainer.control.should_training_stop:
        raise Fault(f"{done} steps were made of {asked if asked > 0 else 'at least 1'}, so nothing is called finished")
    if done < 1:
        raise Fault("no step was made, so nothing is called finished")
    check_trained(trainer)
