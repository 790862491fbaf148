"""What a launch asked for: engine, processes, nodes and precision, by the command line and its config file.

`accelerate launch` can run something else than was asked for, and exit 0 (a MULTI_CPU config runs one process,
ZeRO under ACCELERATE_USE_CPU is DDP). So what is named is read here, and compared with what exists.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from pte_trl.compat.engines import default_launch_config, launch_parser
from pte_trl.compat.transformers import fsdp_version_of, zero_stage_of

HINT = (
    "without a GPU, --use_cpu true goes to the script and not to accelerate, and its config must be ddp, zero or fsdp"
)


@dataclass(frozen=True)
class Launch:
    """What was asked for; None where nothing was given.

    Attributes:
        engine: "single", "DDP", "ZeRO-1" to "ZeRO-3", "FSDP1" or "FSDP2".
        processes, nodes: in all.
        precision: mixed precision, "bf16" or "fp16"; accelerate's "no" also means that none was given.
        source: the config file or the command that asked for it.
    """

    engine: str | None = None
    processes: int | None = None
    nodes: int | None = None
    precision: str | None = None
    source: str = "python"


def given_precision(precision) -> str | None:
    return None if precision in (None, False, "no") else str(precision)  # YAML reads a bare `no` as False


def launch_line() -> list[str] | None:
    """The arguments of the `accelerate launch` that started this process, None without one."""
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        for at, word in enumerate(words):
            name = Path(word).name
            if name in ("accelerate-launch", "accelerate.commands.launch", "slurm_task.py"):
                return words[at + 1 :]
            if name in ("accelerate", "accelerate.commands.accelerate_cli") and words[at + 1 : at + 2] == ["launch"]:
                return words[at + 2 :]
    return None


def zero_stage(asked, config: dict) -> int:
    """As accelerate finds it: the flag, then DeepSpeed's own JSON file, then the config's line, then 2."""
    settings = config.get("deepspeed_config") or {}
    if asked.zero_stage is not None:
        return asked.zero_stage
    file = asked.deepspeed_config_file or settings.get("deepspeed_config_file")
    if file is not None:
        return json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)
    return int(settings.get("zero_stage", 2))


def parse_launch(line: list[str]) -> Launch:
    """What a command line of `accelerate launch`, and the config file it uses, ask for."""
    asked = launch_parser().parse_args(line)
    file = asked.config_file
    if file is None and not asked.cpu and default_launch_config().is_file():
        file = default_launch_config()
    config = yaml.safe_load(Path(file).read_text()) if file else {}
    kind = str(config.get("distributed_type", "NO"))
    for flag, name in (("use_deepspeed", "DEEPSPEED"), ("use_fsdp", "FSDP"), ("multi_gpu", "MULTI_GPU")):
        kind = name if getattr(asked, flag) else kind
    processes = asked.num_processes or config.get("num_processes")
    engine = "DDP" if kind.startswith("MULTI") or (processes or 1) > 1 else "single" if file or processes else None
    if kind == "DEEPSPEED":
        engine = f"ZeRO-{zero_stage(asked, config)}"
    elif kind == "FSDP":
        engine = f"FSDP{(config.get('fsdp_config') or {}).get('fsdp_version', asked.fsdp_version)}"
    return Launch(
        engine=engine,
        processes=processes,
        nodes=asked.num_machines or config.get("num_machines"),
        precision=given_precision(asked.mixed_precision or config.get("mixed_precision")),
        source=str(file) if file else "accelerate launch",
    )


def environment_launch() -> Launch:
    """What the variables of a launcher say where no `accelerate launch` is found (torchrun, a container's entry)."""

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    processes = int(os.environ.get("WORLD_SIZE", 1))
    engine = "DDP" if processes > 1 else "single"
    if on("ACCELERATE_USE_DEEPSPEED"):
        engine = f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    elif on("ACCELERATE_USE_FSDP"):
        engine = f"FSDP{os.environ.get('FSDP_VERSION', 1)}"
    precision = given_precision(os.environ.get("ACCELERATE_MIXED_PRECISION"))
    return Launch(engine, processes, precision=precision, source="the environment")


def named_launch(args=None) -> Launch:
    """What this process was launched as.

    Args:
        args: TrainingArguments; their own `deepspeed` and `fsdp` keys name an engine, too.
    """
    line = launch_line()
    launch = environment_launch() if line is None else parse_launch(line)
    if getattr(args, "deepspeed", None):
        stage = zero_stage_of(args)
        launch = Launch(f"ZeRO-{stage}", launch.processes, launch.nodes, launch.precision, "the recipe's deepspeed")
    elif getattr(args, "fsdp", None):
        version = fsdp_version_of(args)
        launch = Launch(f"FSDP{version}", launch.processes, launch.nodes, launch.precision, "the recipe's fsdp")
    return launch


def check_world(processes: int, launch: Launch | None = None) -> None:
    """Refuses processes that do not know of each other, each of which would do all the work, or that are too few.

    Args:
        processes: that this one counts, itself included.

    Raises:
        ValueError: naming what was launched, and what counts.
    """
    launch = launch or named_launch()
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != processes:
        raise ValueError(f"WORLD_SIZE={launched}, but this process counts {processes}: {HINT}")
    if launch.processes not in (None, processes):
        raise ValueError(f"num_processes={launch.processes} ({launch.source}), but {processes} runs: {HINT}")
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if launch.nodes not in (None, nodes):
        raise ValueError(f"num_machines={launch.nodes} ({launch.source}), but {nodes} takes part")


def check_launch(args) -> Launch:
    """Before any weights load: are the processes those asked for, and do recipe and launch agree on the precision?

    Args:
        args: the recipe's TrainingArguments.

    Raises:
        ValueError: naming both sides.
    """
    launch = named_launch(args)
    check_world(args.world_size, launch)
    if args.fsdp and args.parallel_mode.value != "distributed":
        raise ValueError(
            f"fsdp={args.fsdp!r}: divides a model over the processes of a launch, and this process is alone; allowed "
            "with `accelerate launch --num_processes 2` or more, or leave fsdp out"
        )
    if args.fsdp and args.deepspeed:
        raise ValueError(f"fsdp={args.fsdp!r} with deepspeed={args.deepspeed!r}: give one of the two")
    recipe = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if launch.precision not in (None, recipe):
        raise ValueError(
            f"mixed_precision={launch.precision} ({launch.source}), but the recipe has bf16={args.bf16}, "
            f"fp16={args.fp16}: make them agree, or leave mixed_precision out of the launch"
        )
    return launch
