"""The machine a run would be on: GPUs, memory, disk, threads, and whether the hub can be reached."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU; total and free memory in bytes."""

    name: str
    total: int
    free: int


def gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return found


def driver() -> str | None:
    """The version of the NVIDIA driver, None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def gpu_rows(found: list[Gpu], driver_version: str | None) -> list[tuple[str, str]]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    driver_text = f", driver {driver_version}" if driver_version else ""
    rows = [
        (f"GPU {index}", f"{gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free")
        for index, gpu in enumerate(found)
    ]
    return [*(rows or [("GPU", "no GPU")]), ("torch build", f"{build}{driver_text}")]


def memory() -> tuple[int, int]:
    """Free and total memory in bytes: of the machine, or of the container where that has less."""
    seen = psutil.virtual_memory()
    limit, used = container_memory()
    return min(seen.available, limit - used), min(seen.total, limit)


def container_memory(folder: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Limit and use of a container's memory in bytes; infinity and 0 where none is set."""
    try:
        return float((folder / "memory.max").read_text()), float((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return float("inf"), 0.0


def threads() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"{usable} cores, torch uses {torch.get_num_threads()}{f' (OMP_NUM_THREADS={threads})' if threads else ''}"


def hub() -> tuple[str, bool]:
    """Whether the Hugging Face hub answers, in words, and whether a run can use it; waits `LIMIT` seconds at most."""
    from huggingface_hub import constants, get_session

    from pte_trl.models.hub import LIMIT, is_offline, within

    if is_offline():
        return "not asked, HF_HUB_OFFLINE is set: only what is in the local cache can be used", True
    try:
        within(LIMIT, lambda: get_session().head(constants.ENDPOINT, timeout=LIMIT))
    except Exception as error:  # the client's, the system's or a proxy's: none of them is an answer
        return f"cannot be reached ({' '.join((str(error) or type(error).__name__).split())[:120]})", False
    return "reachable", True


def rows(found: list[Gpu], hub_words: str) -> list[tuple[str, str]]:
    """Name and value of every line about this machine."""
    free, total = memory()
    disk = shutil.disk_usage(".")
    return [
        *gpu_rows(found, driver()),
        ("memory", f"{free / GB:.1f} of {total / GB:.1f} GB free"),
        ("disk", f"{disk.free / GB:.1f} of {disk.total / GB:.1f} GB free in {Path.cwd()}"),
        ("threads", threads()),
        ("hub", hub_words),
    ]
