"""The demo of one screen: what leaves the cache is lost to LoRA and not to PTE.

    python -m experiments.demo --tier tiny --output outputs/demo

What is done is kept: a second run shows the results at once, an interrupted one resumes at the stage it was in.
"""

import argparse
import json
import resource
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from experiments.demo.plan import LOGS, RESULTS, Sizes, stages
from experiments.demo.screen import introduction, screen
from experiments.demo.stages import StageFailed, duration, run_together

INTERRUPTED, TERMINATED = 130, 143
SETTINGS = "settings.json"


def parse(argv: list[str] | None) -> tuple[Sizes, Path]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m experiments.demo")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    values = vars(parser.parse_args(argv))
    folder = values.pop("output")
    for name, value in values.items():
        if value < (0 if name == "seed" else 1):
            parser.error(f"{name}={value}: must be at least {0 if name == 'seed' else 1}")
    return Sizes(**values), folder


def check_same(folder: Path, sizes: Sizes) -> None:
    """Refuses to resume a demo of other sizes; notes the sizes of a new one.

    Raises:
        ValueError: naming the sizes that differ.
    """
    path, now = folder / SETTINGS, asdict(sizes)
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [f"{key}={now[key]} (there: {before.get(key)})" for key in now if before.get(key) != now[key]]:
            raise ValueError(
                f"{', '.join(changed)}: {folder} holds a demo of other sizes; take another --output, or remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now) + "\n")


def make(sizes: Sizes, folder: Path) -> None:
    """Runs every stage that is not done."""
    began = time.perf_counter()
    for group in stages(sizes, folder):
        run_together(group, folder / LOGS)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = duration(used.ru_utime + used.ru_stime)
    print(f"  {'all':<24}{duration(time.perf_counter() - began):>12}, {spent} of processor time\n")


def main(argv: list[str] | None = None) -> None:
    sizes, folder = parse(argv)
    # As Ctrl-C does, so that the stages are stopped as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        check_same(folder, sizes)
        print(introduction(sizes, folder), flush=True)
        make(sizes, folder)
    except (StageFailed, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes at this stage", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(screen(json.loads((folder / RESULTS).read_text()), folder))
