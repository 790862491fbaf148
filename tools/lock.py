"""Writes the lock files from pyproject.toml and requirements.txt: every package that is installed, with its hashes.

    pip install uv && python tools/lock.py

requirements-build.lock      what builds source packages, installed first
requirements.lock            what any machine needs, torch excepted
requirements-torch.lock      torch as the index has it (on Linux for CUDA), and what it needs there
requirements-torch-cpu.lock  torch's build for CPUs, where pip is told of a place that has it
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "uv pip compile pyproject.toml --extra all --constraint requirements.txt --universal --python-version 3.11"
COMMAND += " --generate-hashes --no-annotate --no-header --no-emit-index-url --quiet"
FILES = {"requirements-build.lock": r"setuptools", "requirements-torch.lock": r"torch|nvidia-.*|cuda-.*|triton"}
CPU = "requirements-torch-cpu.lock"
HEAD = "# Written by tools/lock.py.\n"


def blocks(text: str) -> dict[str, str]:
    """Name and markers -> a requirement with its hashes, as it stands in a lock file."""
    found = re.findall(r"^(\S.*?) \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {line: f"{line} \\\n{hashes}" for line, hashes in found}


def cpu_build(requirement: str) -> str | None:
    """The requirement of the build for CPUs with its hash, None where pip finds none on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", folder, f"{requirement}+cpu"]
        if subprocess.run(command).returncode:
            return None
        (path,) = Path(folder).iterdir()
        return f"{requirement}+cpu \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def main() -> None:
    text = subprocess.run(COMMAND.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = blocks(text)
    parts: dict[str, list[str]] = {"requirements.lock": [], **{name: [] for name in FILES}}
    for line, block in found.items():
        name = line.split("==")[0]
        file = next((file for file, names in FILES.items() if re.fullmatch(names, name)), "requirements.lock")
        parts[file].append(block)
    for file, lines in parts.items():
        (ROOT / file).write_text(HEAD + "".join(lines))
        print(f"{file}: {len(lines)} packages")
    (torch,) = (line.split(" ")[0] for line in found if line.startswith("torch=="))
    if (build := cpu_build(torch)) is not None:
        (ROOT / CPU).write_text(HEAD + build)
        print(f"{CPU}: {torch}+cpu")


if __name__ == "__main__":
    main()
