"""Runs of the recipe in forked processes: the imports are paid once, and every rank can be killed for itself."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from experiments.tiny.task import DIFFICULTIES, rows
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
# For the server that forks, and for launches of other kinds; pytest's own path does not reach them.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faulty"])


def deepspeed(stage: int) -> dict[str, str]:
    """What `accelerate launch` sets for ZeRO."""
    keys = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": str(stage), "MIXED_PRECISION": "no"}
    keys |= {"GRADIENT_ACCUMULATION_STEPS": "auto", "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    return {f"ACCELERATE_{key}": value for key, value in keys.items()}


def fsdp2() -> dict[str, str]:
    """The same for accelerate_configs/fsdp2.yaml."""
    keys = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}
    keys |= {"CPU_RAM_EFFICIENT_LOADING": "true", "SYNC_MODULE_STATES": "true", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    return {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"} | {
        f"FSDP_{key}": value for key, value in keys.items()
    }


ENGINES = {
    "one": {"processes": 1},
    "ddp": {"processes": 2},
    "zero2": {"processes": 2, "environment": deepspeed(2)},
    "zero3": {"processes": 2, "environment": deepspeed(3)},
    "fsdp2": {"processes": 2, "environment": fsdp2()},
}
# What tells the time, and not what was computed.
TIMES = ("step_time", "tokens_per_second", "runtime", "per_second")


@dataclass
class Done:
    """How a run ended: the exit status of every rank, what each wrote, seconds."""

    codes: list[int]
    texts: list[str]
    seconds: float

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def accelerate_launch() -> list[str]:
    """The words of `accelerate launch`, which is a process of its own; what it starts is forked."""
    code = f"import sys; sys.executable = {python()!r}; sys.argv.pop(0)"
    code += "; from accelerate.commands.accelerate_cli import main; main()"
    return [sys.executable, "-c", code, "accelerate", "launch"]


def workplace(folder: Path) -> Path:
    """A tiny model that has begun to box its answers, and its problems."""
    pretrain = [python(), "-m", "experiments.tiny.pretrain", "--steps", "60", "--test-problems", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(pretrain, cwd=folder, env=environment, check=True, capture_output=True, timeout=300)
    lines = [json.dumps(row) for row in rows("train", 40, 2, DIFFICULTIES["medium"])]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(output: str, processes: int = 1, **changes) -> list[str]:
    """Flags of a short run: six steps of 16 completions over all ranks, a checkpoint every two."""
    flags = {
        "per_device_train_batch_size": 16 // processes,
        "grader_workers": 1,  # each takes a second to start
        "max_completion_length": 32,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "dataset_name": "train.jsonl",
        "format_reward_weight": 0.5,
        "log_completions": "true",
        "output_dir": output,
    } | changes
    return [
        "--config",
        str(ROOT / "recipes/tiny.yaml"),
        *(word for k, v in flags.items() for word in (f"--{k}", str(v))),
    ]


def child(folder: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    """In the forked process: what `python tests/faulty.py` would do."""
    from tests import faulty

    os.chdir(folder)
    os.environ.update(environment)
    for number, path in ((1, log), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["tests/faulty.py", *argv]
    faulty.main(argv)


def start(folder: Path, output: str, fault: str = "", engine: dict | None = None, **changes) -> tuple[list, list[str]]:
    """The processes of a run, one a rank, and their logs."""
    engine = engine or ENGINES["one"]
    count = engine["processes"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FAULT": fault, **engine.get("environment", {})}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {key[4:]: str(changes.pop(key)) for key in list(changes) if key.startswith("env_")}
    processes, logs = [], []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count} if count > 1 else {}
        logs.append(str(folder / f"{output.replace('/', '-')}-{time.monotonic_ns()}-{rank}.log"))
        everything = environment | {key: str(value) for key, value in world.items()}
        argv = arguments(output, count, **changes)
        processes.append(CONTEXT.Process(target=child, args=(str(folder), argv, everything, logs[-1])))
        processes[-1].start()
    return processes, logs


def run(folder: Path, output: str, fault: str = "", engine: dict | None = None, limit: float = 120, **changes) -> Done:
    """A run to its end, whatever that is; ranks that do not end within `limit` seconds are an error."""
    began = time.monotonic()
    processes, logs = start(folder, output, fault, engine, **changes)
    try:
        for process in processes:
            process.join(max(0.1, limit - (time.monotonic() - began)))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
    texts = [Path(log).read_text() for log in logs]
    assert not hanging, f"ranks {hanging} hang after {limit} s\n" + "\n".join(text[-2000:] for text in texts)
    return Done([process.exitcode for process in processes], texts, time.monotonic() - began)


def course(folder: Path, after: int = 0) -> dict:
    """What a finished run computed in the steps after `after`: metrics, prompts, texts, advantages, final weights."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    metrics = [
        {key: value for key, value in entry.items() if not key.endswith(TIMES)}
        for entry in history
        if "grad_norm" in entry and entry["step"] > after
    ]
    tables = [pd.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]
    texts = [table.to_dict("list") for table in tables if len(table) and table["step"][0] > after]
    return {"metrics": metrics, "texts": texts, "weights": load_file(folder / "adapter_model.safetensors")}


def gap(one: dict, other: dict) -> list[str]:
    """What differs between two courses, bit by bit; nothing for equal ones."""
    found = [f"{key}" for key in ("metrics", "texts") if repr(one[key]) != repr(other[key])]
    return found + [name for name, value in one["weights"].items() if not value.equal(other["weights"][name])]
