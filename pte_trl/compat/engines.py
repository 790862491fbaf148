"""Private names of accelerate and DeepSpeed: what a launch asks for, what runs, and which part of a weight is here."""

import argparse
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

__all__ = [
    "checkpoint_records",
    "default_launch_config",
    "gather_as_one",
    "keep_output_dtype",
    "launch_parser",
    "launched_zero_stage",
    "release_backward_leftovers",
    "running_zero_stage",
    "zero3_numel",
    "zero3_part",
]


# ---- accelerate --------------------------------------------------------------------------------------------------


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`, to read the command line that started this process."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def default_launch_config() -> Path:
    """The file that `accelerate config` writes and `accelerate launch` reads when it is given none."""
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file)


def keep_output_dtype(accelerator) -> None:
    """FSDP2 then leaves what the model returns as it is; under mixed precision it would round log-probs to bfloat16.

    To be called before the model is prepared; does nothing without FSDP or without mixed precision.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def launched_zero_stage(args) -> int | None:
    """ZeRO's stage of the engine that a `TrainingArguments` will train with; None without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


# ---- DeepSpeed ---------------------------------------------------------------------------------------------------


def gather_as_one(module: nn.Module) -> None:
    """ZeRO-3 gathers the module's weights when it is entered and releases them when it is left, not one by one."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def release_backward_leftovers(engine: nn.Module) -> None:
    """ZeRO-3 lets go of weights of modules whose backward it has seen begin but not end, the whole model above all.

    It does so itself behind every backward. As long as one counts as under way, no forward releases frozen weights.
    """
    engine.optimizer.parameter_offload.release_backward_leftovers()


def running_zero_stage(model: nn.Module) -> int | None:
    """ZeRO's stage by the classes of the engine that wraps the model and of its optimizer; None in another engine."""
    if type(model).__name__ != "DeepSpeedEngine":
        return None
    optimizer = type(model.optimizer).__name__
    if optimizer == "DeepSpeedZeroOptimizer_Stage3":
        return 3
    if optimizer == "DeepSpeedZeroOptimizer":
        return 2 if model.optimizer.partition_gradients else 1
    return 0


def zero3_part(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter that ZeRO-3 has divided; None for any other."""
    return getattr(parameter, "ds_tensor", None)


def zero3_numel(parameter: Tensor) -> tuple[int, int] | None:
    """Elements on this GPU, and in all, of a parameter under ZeRO-3; None for any other.

    Its own `numel` is 0 while it is divided; small parameters never are.
    """
    if not hasattr(parameter, "ds_tensor"):
        return None
    return parameter.numel() or parameter.ds_tensor.numel(), parameter.ds_numel


def checkpoint_records() -> list[type]:
    """The classes in ZeRO's checkpoints besides tensors: they hold values, and making one runs nothing else."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        return []
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
