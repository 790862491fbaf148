"""Writes the lock files from pyproject.toml and requirements.txt: every package that is installed, with its hashes.

    pip install uv && python tools/lock.py

requirements-build.lock   what builds source packages, installed first
requirements.lock         everything else that any machine needs
requirements-cuda.lock    what torch's build for CUDA needs besides
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "uv pip compile pyproject.toml --extra dev --constraint requirements.txt --universal --python-version 3.11"
COMMAND += " --generate-hashes --no-annotate --no-header --no-emit-index-url --quiet"
FILES = {"requirements-build.lock": r"setuptools", "requirements-cuda.lock": r"nvidia-.*|cuda-.*|triton"}
HEAD = "# Written by tools/lock.py.\n"


def blocks(text: str) -> dict[str, str]:
    """Name and markers -> a requirement with its hashes, as it stands in a lock file."""
    found = re.findall(r"^(\S.*?) \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {line: f"{line} \\\n{hashes}" for line, hashes in found}


def local_hash(requirement: str) -> str | None:
    """The hash of the file that pip takes on this machine, which may be a build that the index does not have."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement], check=True)
        (path,) = Path(folder).iterdir()
        return hashlib.sha256(path.read_bytes()).hexdigest()


def with_hash(block: str, digest: str) -> str:
    return block if digest in block else f"{block.rstrip()} \\\n    --hash=sha256:{digest}\n"


def main() -> None:
    text = subprocess.run(COMMAND.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = blocks(text)
    (torch,) = (line for line in found if line.startswith("torch=="))
    found[torch] = with_hash(found[torch], local_hash(torch.split(" ")[0]))
    old = ROOT / "requirements.lock"
    for digest in re.findall(r"sha256:(\w+)", blocks(old.read_text()).get(torch, "") if old.exists() else ""):
        found[torch] = with_hash(found[torch], digest)  # of builds found on other machines
    parts: dict[str, list[str]] = {"requirements.lock": [], **{name: [] for name in FILES}}
    for line, block in found.items():
        name = line.split("==")[0]
        file = next((file for file, names in FILES.items() if re.fullmatch(names, name)), "requirements.lock")
        parts[file].append(block)
    for file, lines in parts.items():
        (ROOT / file).write_text(HEAD + "".join(lines))
        print(f"{file}: {len(lines)} packages")


if __name__ == "__main__":
    main()
