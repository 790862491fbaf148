"""Runs the stages of the demo: each is a process with a log file, a progress bar, and a file that says it is done."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.2  # seconds between two looks at the running stages
TAIL = 16_384  # bytes at the end of a log in which its latest progress stands
STOPPING = (signal.SIGTERM, signal.SIGINT)
SHOWN = 15  # lines of a failed stage's log
BAR = "  {desc:<24}{percentage:3.0f} %|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Args:
        name: of its log file.
        title: of its progress bar.
        command: arguments of the Python interpreter.
        product: the file that the command writes last; where it exists the stage is done.
        steps: what the command's own progress bar counts up to.
        metric: a number of its training log that the bar shows.
    """

    name: str
    title: str
    command: Sequence
    product: Path
    steps: int
    metric: str | None = None


class StageFailed(Exception):
    """A stage ended without its product; the message has the end of its log."""


class Running:
    """A stage's process and its progress bar."""

    def __init__(self, stage: Stage, logs: Path, position: int):
        self.stage, self.log = stage, logs / f"{stage.name}.log"
        self._began = time.perf_counter()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # The models are tiny: more threads cost more than they give.
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *map(str, stage.command)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        # On a terminal alone: in a file every turn of a bar would be a line.
        self._bar = tqdm(
            total=stage.steps, desc=stage.title, position=position, leave=False, bar_format=BAR, disable=None
        )

    def step(self) -> bool:
        """Shows where the stage is; True when it is done.

        Raises:
            StageFailed: the process ended with an error, or without the product.
        """
        code = self.process.poll()
        done, metric = progress(self.log, self.stage)
        self._bar.set_postfix_str("" if metric is None else f"{self.stage.metric} {metric}", refresh=False)
        self._bar.n = done
        self._bar.refresh()
        if code is None:
            return False
        self._bar.close()
        if code != 0 or not self.stage.product.exists():
            raise StageFailed(
                f"{self.stage.title} failed (exit code {code}); the last lines of {self.log}:\n\n"
                f"{last_lines(self.log)}"
            )
        report(self.stage, duration(time.perf_counter() - self._began))
        return True

    def stop(self) -> None:
        self._bar.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@contextmanager
def deferred_signals():
    """SIGTERM and SIGINT that arrive inside take effect at the end."""
    came = []
    handlers = {number: signal.signal(number, lambda *about: came.append(about)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            if callable(handlers[number]):
                handlers[number](number, frame)
            else:
                signal.raise_signal(number)


def run_together(stages: list[Stage], logs: Path) -> None:
    """Runs those of the stages that are not done, side by side.

    Raises:
        StageFailed: by the first that fails; the others are stopped then.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running = []
    try:
        for stage in stages:
            if stage.product.exists():
                report(stage, "kept")
            else:
                with deferred_signals():  # or a process could be started that nobody knows of
                    running.append(Running(stage, logs, position=len(running)))
        left = running
        while left := [each for each in left if not each.step()]:
            time.sleep(POLL)
    finally:
        for each in running:
            each.stop()


def report(stage: Stage, how: str) -> None:
    tqdm.write(f"  {stage.title:<24}{how:>12}")
    sys.stdout.flush()


def progress(log: Path, stage: Stage) -> tuple[int, str | None]:
    """Steps done, and the latest value of the metric, by the bars and dictionaries in a stage's log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    steps = re.findall(rf"\b(\d+)/{stage.steps} \[", text)
    metrics = re.findall(rf"'{stage.metric}': '?([-\d.e]+)", text)
    return int(steps[-1]) if steps else 0, metrics[-1] if metrics else None


def last_lines(log: Path) -> str:
    """The end of a log, without progress bars."""
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace"))
    return "\n".join([line for line in lines if line.strip() and not re.search(r"\d+/\d+ \[", line)][-SHOWN:])


def duration(seconds: float) -> str:
    """As "62 s" or "4 min 07 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
