"""Kills a training at every moment that `tests/faulty.py` knows, under every engine, and takes it up again.

    python -m tests.kill_matrix --engines one ddp zero2 zero3 --output matrix.md

A row per moment, signal and engine: how the ranks ended, where the next launch resumed, and whether its metrics,
prompts, sampled texts, advantages and final weights are those of a run that nobody killed, bit by bit.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.launches import ENGINES, course, gap, run, workplace


class Kill(NamedTuple):
    """A fault of `tests/faulty.py`, and the step after which the next launch must resume (0: from the start)."""

    moment: str
    step: int
    rank: int
    signal: str
    resumes: int

    @property
    def fault(self) -> str:
        return f"{self.moment}:{self.step}:{self.rank}:{self.signal}"


# Checkpoints are written after steps 2, 4 and 6, by the time the next step is the one under way; one is kept.
KILLS = [
    Kill("rollout", 1, 0, "SIGKILL", 0),
    Kill("rollout", 4, 1, "SIGKILL", 2),
    Kill("backward", 4, 0, "SIGKILL", 2),
    Kill("backward", 4, 1, "SIGKILL", 2),
    Kill("optimizer", 4, 1, "SIGKILL", 2),
    Kill("saving", 3, 0, "SIGKILL", 0),
    Kill("saving", 5, 0, "SIGKILL", 2),
    Kill("saving", 5, 1, "SIGKILL", 2),
    Kill("rename", 5, 0, "SIGKILL", 2),
    Kill("published", 5, 0, "SIGKILL", 4),
    Kill("rotation", 5, 0, "SIGKILL", 4),
    Kill("published", 7, 0, "SIGKILL", 6),
    Kill("rollout", 3, 1, "SIGTERM", 3),
    Kill("backward", 3, 0, "SIGTERM", 3),
    Kill("saving", 3, 0, "SIGTERM", 3),
]


def on(kill: Kill, processes: int) -> Kill:
    """The same where there is one process only."""
    return kill if processes > 1 else kill._replace(rank=0)


def kills_of(engine: str) -> list[Kill]:
    processes = ENGINES[engine]["processes"]
    return list(dict.fromkeys(on(kill, processes) for kill in KILLS))


def kill_and_resume(folder: Path, engine: str, kill: Kill, unkilled: str) -> dict:
    """One row of the matrix."""
    name = f"{engine}-{kill.fault.replace(':', '-')}"
    killed = run(folder, name, kill.fault, ENGINES[engine])
    for table in (folder / name / "completions").glob("*"):
        table.unlink()  # so that what is compared was sampled by the second launch
    resumed = run(folder, name, "", ENGINES[engine])
    started = re.search(r"resumes from \S*checkpoint-(\d+)", resumed.text)
    step = int(started[1]) if started else 0
    whole = resumed.codes == [0] * len(resumed.codes)
    return {
        "codes": killed.codes,
        "seconds": killed.seconds,
        "text": killed.text,
        "text_of": killed.texts,
        "resumed": resumed,
        "step": step,
        "gap": gap(course(folder / name, step), course(folder / unkilled, step)) if whole else ["did not finish"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["one", "ddp", "zero2"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = ["| engine | moment | rank | signal | ranks ended with | resumed after step | equal |", "|---" * 7 + "|"]
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = workplace(Path(place))
        for engine in options.engines:
            assert run(folder, f"{engine}-unkilled", "", ENGINES[engine]).codes == [0] * ENGINES[engine]["processes"]
            for kill in kills_of(engine):
                row = kill_and_resume(folder, engine, kill, f"{engine}-unkilled")
                fine = not row["gap"] and row["step"] == kill.resumes
                failed += not fine
                codes = ", ".join(map(str, row["codes"]))
                equal = "yes" if fine else f"**no**: {', '.join(row['gap']) or 'another step'}"
                lines.append(
                    f"| {engine} | {kill.moment} of step {kill.step} | {kill.rank} | {kill.signal} | {codes} "
                    f"| {row['step']} | {equal} |"
                )
                print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
