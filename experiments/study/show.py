"""What a study will run, what of it is done, and the minutes of the trainings that are left.

    make plan-study-load DIGITS=8 SEEDS=0      # python -m experiments.study.show load

A minute is measured, never assumed: a training's own, or that of the nearest training that is finished, step by step
(the same arm with another seed, then another size of it, then any arm of the study). Without one it is "?". Standard
library only.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.rules import Run
from experiments.study.plan import studies
from experiments.study.runs import Study


@dataclass(frozen=True)
class Line:
    """A run of a study; `minutes` of a training, None where nothing is known, and of everything else."""

    run: Run
    done: bool
    training: bool
    minutes: float | None


def needed(study: Study) -> list[Run]:
    """The runs that the study's results need, in order, each once; files that other studies make are left out."""
    known = {run.target: run for run in study.runs if not run.phony}
    found: dict[str, Run] = {}

    def add(target: str) -> None:
        if target in known and target not in found:
            for need in (*known[target].present, *known[target].needs):
                add(need)
            found[target] = known[target]

    for result in study.results:
        add(result)
    return list(found.values())


def steps_of(run: Run) -> int | None:
    """Steps of a training; None of any other run."""
    words = run.commands[-1] if run.commands else ()
    if not run.target.endswith("/manifest.json") or "--max_steps" not in words:
        return None
    return int(words[words.index("--max_steps") + 1])


def seconds_a_step(log: Path) -> float | None:
    """Of a finished training; None of one that is not."""
    state = json.loads(log.read_text())
    took = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
    return took[-1] / state["global_step"] if took and state["global_step"] else None


def measured(run: Run, study: Study) -> float | None:
    """Seconds of a step: the median of the nearest trainings that are finished."""
    folder, whole = Path(run.target).parent, Path(study.folder)
    arm = folder.name.rpartition("-")[0]
    for base, pattern in (
        (folder, "trainer_state.json"),
        (folder.parent, f"{arm}-*/trainer_state.json"),
        (whole, f"**/{arm}-*/trainer_state.json"),
        (whole, "**/*-*/trainer_state.json"),
    ):
        found = [seconds for log in base.glob(pattern) if (seconds := seconds_a_step(log)) is not None]
        if found:
            return median(found)
    return None


def lines(study: Study) -> Iterator[Line]:
    for run in needed(study):
        steps = steps_of(run)
        seconds = None if steps is None else measured(run, study)
        took = None if seconds is None else steps * seconds / 60
        yield Line(run, Path(run.target).exists(), steps is not None, took)


def report(study: Study) -> str:
    """A line for every run, and what is left."""
    found = list(lines(study))
    shown = [
        f"{'done' if one.done else 'to do':<6} {minutes(one):>8}  {one.run.target.removesuffix('/manifest.json')}"
        for one in found
    ]
    left = [one for one in found if not one.done]
    known = [one.minutes for one in left if one.minutes is not None]
    unknown = sum(one.training and one.minutes is None for one in left)
    trainings = sum(one.training for one in left)
    total = f"left: {len(left)} of {len(found)} runs; {trainings} of them trainings, {sum(known):.0f} minutes"
    if unknown:
        total += f" and {unknown} of unknown length (no training of this study is finished)"
    note = "Minutes are of trainings, by the steps of those that are finished; measuring and base models come on top."
    return "\n".join([f"{'state':<6} {'minutes':>8}  run", *shown, "", total, note])


def minutes(one: Line) -> str:
    if not one.training:
        return ""
    return "?" if one.minutes is None else f"{one.minutes:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    found = {study.name: study for study in studies()}
    name = parser.parse_args().study
    if name not in found:
        raise SystemExit(f"error: plan-study-{name}: there is no such study; allowed are {', '.join(found)}")
    print(report(found[name]))


if __name__ == "__main__":
    main()
