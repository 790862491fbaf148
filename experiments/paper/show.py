"""What a table or figure will run, what of it is done, and what the rest costs.

    python -m experiments.paper.show table1 --scale night       # make plan-table1 SCALE=night
    python -m experiments.paper.show all --scale paper          # a line for every table and figure

Standard library only, so that it can be asked before there is an environment.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.paper import filters as chosen
from experiments.paper.cost import (
    BANDWIDTH_SHARE,
    CARDS,
    FLOPS_SHARE,
    PAPER_STEP,
    cost,
    setting,
    shape_of,
    step_seconds,
)
from experiments.paper.filters import Filters
from experiments.paper.plan import ITEMS, EvaluationRun, TrainingRun, needed, short_name
from experiments.paper.progress import DONE, bytes_of, measured_step, state
from experiments.paper.scales import SCALES, Scale, scale_of


@dataclass(frozen=True)
class Line:
    """A run with its cost; `measured`: the hours and tokens follow from a measured step."""

    run: TrainingRun | EvaluationRun
    state: str
    tokens: float
    hours: float | None
    disk: float
    measured: bool


def line(run: TrainingRun | EvaluationRun, at: Scale, card: str) -> Line:
    """The line of a run: measured where a step has been, estimated elsewhere."""
    expected, found = cost(run, at, card), state(run)
    step = measured_step(run) if isinstance(run, TrainingRun) else None
    taken = bytes_of(run) if found == DONE else expected.disk
    if step is None:
        return Line(run, found, expected.tokens, expected.hours, taken, measured=False)
    steps = int(setting(run, at, "max_steps"))
    hours = steps * step.seconds * step.processes / 3600
    return Line(run, found, steps * step.tokens, hours, taken, measured=True)


def report(item: str, scale: str, filters: Filters, card: str | None = None) -> str:
    """The whole text for an item, or for "all" of them."""
    at = scale_of(scale)
    card = card or at.card
    by_item = {one: needed(one, scale, filters) for one in (ITEMS if item == "all" else (item,))}
    lines = {run: line(run, at, card) for runs in by_item.values() for run in runs}
    title = f"{item}, SCALE={scale} {filters}".rstrip()
    if not lines:
        return f"{title}: the filters leave none of its runs"
    hours = "core-hours" if card == "CPU" else "GPU-hours"
    if item == "all":
        head = ["make", "trainings", "evaluations", "tokens", hours, "disk"]
        body = [[f"reproduce-{one}", *summary([lines[run] for run in runs])] for one, runs in by_item.items()]
        body.append(["each run once", *summary(lines.values())])
    else:
        head = ["make", "state", "tokens", hours, "by", "disk"]
        body = [cells(one, scale) for one in lines.values()]
    left = [one for one in lines.values() if one.state != DONE]
    totals = [f"{name:>8}: {total(ones, hours)}" for name, ones in (("all", lines.values()), ("to do", left))]
    return "\n".join([title, "", *table(head, body), "", *totals, "", *notes(lines.values(), at, card)])


def cells(one: Line, scale: str) -> list[str]:
    by = "measured" if one.measured else "estimated"
    return [short_name(one.run, scale), one.state, *amounts([one])[:2], by, amounts([one])[2]]


def amounts(lines: Iterable[Line]) -> list[str]:
    """Tokens, hours and bytes; "?" where the shape of a model is not known."""
    lines = list(lines)
    known = all(one.hours is not None for one in lines)
    hours = number(sum(one.hours for one in lines)) if known else "?"
    return [scaled(sum(one.tokens for one in lines)), hours, f"{scaled(sum(one.disk for one in lines))}B"]


def number(value: float) -> str:
    """Three digits, and at most three decimals."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def scaled(value: float) -> str:
    """With a prefix: 4.59 G, 148 M, 56 k."""
    for size, prefix in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{number(value / size)} {prefix}"
    return f"{value / 1e3:.0f} k"


def summary(lines: Iterable[Line]) -> list[str]:
    """Done and all of both kinds, and their amounts."""
    lines = list(lines)
    kinds = [[one for one in lines if isinstance(one.run, kind)] for kind in (TrainingRun, EvaluationRun)]
    counts = [f"{sum(one.state == DONE for one in ones)} of {len(ones)} done" for ones in kinds]
    return counts + amounts(lines)


def total(lines: Iterable[Line], unit: str) -> str:
    lines = list(lines)
    trainings = sum(isinstance(one.run, TrainingRun) for one in lines)
    tokens, hours, disk = amounts(lines)
    counts = f"{count(trainings, 'training')} and {count(len(lines) - trainings, 'evaluation')}"
    return f"{counts}, {tokens} tokens, {hours} {unit}, {disk} on the disk"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notes(lines: Iterable[Line], at: Scale, card: str) -> list[str]:
    """What the numbers rest on."""
    lines, speed = list(lines), CARDS[card]
    of = f"{card}, {speed.flops / 1e12:g} TFLOP/s and {speed.bandwidth / 1e12:g} TB/s"
    share = f"{FLOPS_SHARE:.0%} and {BANDWIDTH_SHARE:.0%}"
    out = [
        f"Estimated: {of} at {share}, every completion as long as it may be. experiments/paper/cost.py has the "
        "formulas; launches are measured on one H100, the shares assumed, and no whole run has confirmed them."
    ]
    if any(one.hours is None for one in lines):
        out.append("?: the model is no folder with a config.json, and its shape is not known.")
    if any(one.measured for one in lines):
        out.append(
            "Measured: the median step of that training, or of another seed of it, wherever it ran, times its steps."
        )
    trainings = [one.run for one in lines if isinstance(one.run, TrainingRun)]
    if at.name == "paper" and trainings:
        steps = sum(int(setting(run, at, "max_steps")) for run in trainings)
        minutes = [step_seconds(run, at, shape_of(run.model), CARDS["A100"]) / 60 for run in trainings]
        out.append(
            f"The paper states {PAPER_STEP // 60} minutes a step on 8 A100, without the model; estimated here are "
            f"{min(minutes):.1f} to {max(minutes):.1f}. At the paper's pace these {steps:,} steps take "
            f"{number(steps * PAPER_STEP * 8 / 3600)} GPU-hours."
        )
    return [part for text in out for part in textwrap.wrap(text, 119)]


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Aligned columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    right = [index for index, name in enumerate(head) if name in ("tokens", "disk") or name.endswith("-hours")]

    def written(row: list[str]) -> str:
        padded = [
            text.rjust(width) if index in right else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [written(head), "  ".join("-" * width for width in widths), *map(written, body)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("item", help=f"all, or one of {', '.join(ITEMS)}")
    parser.add_argument("--scale", default="paper", help=f"one of {', '.join(SCALES)}")
    parser.add_argument("--card", default="", help=f"GPU to estimate for, one of {', '.join(CARDS)}; the scale's")
    chosen.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.item not in ("all", *ITEMS):
            raise ValueError(
                f"plan-{args.item}: there is no such table or figure; allowed are all, {', '.join(ITEMS)}"
            )
        if args.card and args.card not in CARDS:
            raise ValueError(f"CARD={args.card}: not known; allowed are {', '.join(CARDS)}")
        filters = chosen.read_arguments(scale_of(args.scale), args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report(args.item, args.scale, filters, args.card or None))


if __name__ == "__main__":
    main()
