"""What a figure needs to be reproducible: commit, command, date, hardware and versions."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("pte_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "math-verify")


def hardware(device: str | torch.device) -> str:
    """What a run is on, as its maker calls it."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def commit(file: Path = Path(__file__)) -> str:
    """The project's commit, marked when the working tree differs from it; "unknown" outside a checkout.

    Args:
        file: one of the project's. An installed package may lie inside another repository, which does not track it.
    """

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(file.parent), *args], capture_output=True, text=True)
        except OSError:  # there is no git here
            return ""
        return done.stdout.strip()

    if not git("ls-files", file.name):
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" (changed)" if changed else "")


def command() -> str:
    """The command of this process, as it can be typed again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {module.name}" if module else f"python {os.path.relpath(sys.argv[0])}"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


def environment(device: str | torch.device = "cpu") -> dict:
    """The short form, for benchmarks."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": command(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_manifest(folder: str | Path, device: str | torch.device, processes: int, settings: dict) -> Path:
    """manifest.json of a finished run; written last, and atomically."""
    manifest = environment(device) | {"processes": processes, "versions": versions(), "settings": settings}
    return write_json(Path(folder) / "manifest.json", manifest)


def write_json(path: Path, content) -> Path:
    """Written aside, then renamed."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    aside.replace(path)
    return path
