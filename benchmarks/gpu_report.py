"""The report of `benchmarks.gpu_check`, as Markdown: what ran where, what came of it, and what every step printed."""

import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import is_cuda
from pte_trl.runtime.manifest import command, commit, hardware, versions

LINES, WIDTH = 60, 200  # of what a step has printed; longer lines, as a trainer's log, are folded
FAILED_LINES = 25
# What says nothing about the project, though it is printed.
NOISE = ("USDT:", "Loading weights", "pretraining:", "  warnings.warn(")


@dataclass(frozen=True)
class Result:
    """One step.

    Attributes:
        status: "ok", or how it failed, or why it was left out.
        seconds: wall time.
        output: everything that it has printed.
        figures: of what it has recorded, a line each.
    """

    name: str
    answers: str
    command: str
    status: str
    seconds: float
    output: str
    figures: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status.startswith(("failed", "stopped"))


@dataclass(frozen=True)
class Machine:
    """What the figures hold for; taken once, at the start."""

    facts: dict[str, str]
    began: float

    @classmethod
    def found(cls, device: str) -> "Machine":
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        packages = versions() | {"triton": version_of("triton")}
        facts = {
            "date": now,
            "hardware": gpu() if is_cuda(device) else hardware(device),
            "commit": commit(),
            "command": command(),
            "versions": ", ".join(f"{name} {found}" for name, found in packages.items()),
        }
        return cls(facts, time.perf_counter())


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def gpu() -> str:
    """As the driver calls it: torch would take memory of the GPU, for as long as this process runs, to say so."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown, nvidia-smi: {error}"
    return "; ".join(done.stdout.split("\n")).strip("; ") or f"unknown, nvidia-smi: {done.stderr.strip()}"


def printed(text: str, lines: int) -> str:
    """The last lines, of a progress bar only its last state, as a block that Markdown leaves alone."""
    kept = []
    for line in text.strip("\n").split("\n"):
        # Never a fence inside the block, which would end it.
        line = line.rstrip("\r").split("\r")[-1].rstrip().replace("```", "'''")
        if not line.startswith(NOISE):
            kept += [line[at : at + WIDTH] for at in range(0, max(len(line), 1), WIDTH)]
    cut = [f"({len(kept) - lines} lines before)"] if len(kept) > lines else []
    return "\n".join(["```", *cut, *kept[-lines:], "```"])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def last_words(result: Result) -> str:
    """The last line with a message: of a failed step its error."""
    lines = [line.strip() for line in result.output.split("\n") if line.strip() and not line.startswith(NOISE)]
    return lines[-1][:WIDTH] if lines else "it printed nothing"


def write(path: Path, machine: Machine, results: list[Result], to_come: list[str]) -> None:
    """The report so far. Written aside, then renamed: a reader, or a copy of the folder, never finds half of it."""
    parts = ["# GPU check", ""]
    parts += [f"- {key}: {value}" for key, value in machine.facts.items()]
    parts += [f"- took: {(time.perf_counter() - machine.began) / 60:.1f} minutes"]
    parts += [f"- not run yet: {', '.join(to_come)}"] if to_come else []
    parts += ["", "| step | question | result | seconds |", "|---|---|---|---|"]
    parts += [f"| {r.name} | {cell(r.answers)} | {cell(r.status)} | {r.seconds:.0f} |" for r in results]
    if failed := [r for r in results if r.failed]:
        parts += ["", "## What failed", "", *(f"- `{r.name}`: {r.status}: `{last_words(r)}`" for r in failed)]
    if measured := [r for r in results if r.figures]:
        parts += ["", "## Figures", ""]
        parts += [f"- `{r.name}`: {figure}" for r in measured for figure in r.figures]
    for result in results:
        parts += ["", f"## {result.name}", "", result.answers, "", f"    {result.command}", ""]
        parts += [f"Result: {result.status}; {result.seconds:.0f} seconds."]
        if result.output.strip():
            parts += ["", printed(result.output, FAILED_LINES if result.failed else LINES)]
    aside = path.with_suffix(".tmp")
    aside.write_text("\n".join(parts) + "\n")
    aside.replace(path)
