"""How a run scores completions: what its recipe states, or what `replay: auto` makes of this machine.

`auto` is settled once, when training begins, and is the same on every rank. Log-probs and gradients of one pass and of
segments are equal up to rounding, so a run may be resumed under the other one.
"""

import copy

import torch
from accelerate.utils import gather_object
from torch import nn

from pte_trl.adapter.self_test import check_segments
from pte_trl.estimate.choice import FRAGMENTS, Replay, affordable, beside_engine
from pte_trl.estimate.shape import NotEstimated
from pte_trl.runtime.sharding import check_engine
from pte_trl.runtime.startup import job_of
from pte_trl.training.config import PteGRPOConfig, check_replay
from pte_trl.training.router import check_whole


def stated(args: PteGRPOConfig) -> Replay:
    """What a recipe states; one pass until `auto` is settled."""
    return Replay("one_pass" if args.replay == "auto" else args.replay, args.offload_cache)


def settled(trainer, longest: int | None) -> Replay:
    """What a training runs under, `auto` decided by the rank with the least memory.

    Args:
        trainer: of GRPO, its model where it will train.
        longest: tokens of the longest prompt; None where nobody knows.
    """
    args = trainer.args
    if args.replay != "auto" or not trainer.bounded:
        return stated(args)
    rooms = gather_object([usable(trainer.accelerator.device)])
    if None in rooms:
        return Replay(why="no GPU")
    if refusal := segments_refused(args, trainer.engine, trainer.model):
        return Replay(why=refusal)
    if longest is None:
        return Replay(why="the longest prompt is not known")
    try:
        return affordable(job_of(trainer, trainer.engine, longest), min(rooms))
    except NotEstimated as error:
        return Replay(why=str(error))


def usable(device: torch.device) -> float | None:
    """Bytes of a GPU that this process has or can get, less what fragmentation takes; None on a CPU."""
    if device.type != "cuda":
        return None
    return (1 - FRAGMENTS) * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def step_beside_engine(trainer, longest: int | None) -> float | None:
    """What `rollout_batch_size: auto` needs to know before it keeps the engine (`beside_engine`); None: not known."""
    if not trainer.bounded or longest is None or usable(trainer.accelerator.device) is None:
        return None
    try:
        return beside_engine(job_of(trainer, trainer.engine, longest))
    except NotEstimated:
        return None


def engine_fits(trainer) -> bool:
    """Whether a training step has room beside the rollout engine, as far as that is known."""
    step, room = trainer.step_beside_engine, usable(trainer.accelerator.device)
    return step is not None and room is not None and step + trainer.engine_cache.nbytes <= room


def segments_refused(args: PteGRPOConfig, engine: str | None, model: nn.Module) -> str | None:
    """Why `replay: segments` is refused here, as the checks of that setting say it; None where it is allowed."""
    asked = copy.copy(args)
    asked.replay = "segments"
    try:
        check_replay(asked)
        check_engine(asked, engine)
        check_segments(model.config)
        check_dropout(model)
        check_whole(args, model.config)
    except ValueError as error:
        return str(error)
    return None


def dropouts(model: nn.Module) -> list[str]:
    """Names of modules with dropout."""
    return [
        f"{name}{'' if isinstance(module, nn.Dropout) else '.attention_dropout'}"
        for name, module in model.named_modules()
        if (module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0))
    ]


def check_dropout(model: nn.Module) -> None:
    """Segments run the model again inside backward, where nothing may be random.

    Raises:
        ValueError: naming the first module with dropout.
    """
    if found := dropouts(model):
        raise ValueError(f"replay='segments': dropout in {found[0]} would differ between the two passes; set it to 0")
