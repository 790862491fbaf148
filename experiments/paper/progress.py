"""What there is of a run already: whether it is done, how long its steps took, and what it takes of the disk.

Standard library only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.paper.plan import EvaluationRun, TrainingRun, manifest

DONE, STARTED, TO_DO = "done", "started", "to do"


@dataclass(frozen=True)
class Step:
    """A measured training step: seconds (the median), GPUs (processes), and tokens of prompts and completions."""

    seconds: float
    processes: int
    tokens: float


def state(run: TrainingRun | EvaluationRun) -> str:
    """Done once its manifest is there, as for make."""
    if Path(manifest(run)).is_file():
        return DONE
    return STARTED if Path(run.folder).is_dir() else TO_DO


def measured_step(run: TrainingRun) -> Step | None:
    """From the log of a finished run, or of the newest complete checkpoint of one that is not; None without one.

    Another seed of the same training serves as well.
    """
    own = Path(run.folder)
    name = own.name.partition("-seed")[0]
    for folder in (own, *sorted(own.parent.glob(f"{name}-seed*"))):
        if found := _step(folder):
            return found
    return None


def _step(folder: Path) -> Step | None:
    logs = [folder / "trainer_state.json"]
    logs += [path.parent / "trainer_state.json" for path in sorted(folder.glob("checkpoint-*/complete.json"), key=_n)]
    for log in logs:
        about = log.parent / ("manifest.json" if log.parent == folder else "complete.json")
        if log.is_file() and about.is_file():
            entries = json.loads(log.read_text())["log_history"]
            seconds = [entry["step_time"] for entry in entries if "step_time" in entry]
            tokens = [entry["num_tokens"] / entry["step"] for entry in entries if entry.get("num_tokens")]
            if seconds and tokens:
                return Step(median(seconds), json.loads(about.read_text())["processes"], tokens[-1])
    return None


def _n(listing: Path) -> int:
    """Newest first."""
    return -int(listing.parent.name.rpartition("-")[2])


def bytes_of(run: TrainingRun | EvaluationRun) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in Path(run.folder).rglob("*") if path.is_file())
