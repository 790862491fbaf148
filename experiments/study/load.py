"""How much the state can hold: recall against the number of digits, an encoder an arm, one adapter for all windows.

    make study-load                                   # every run that is missing, then the table and the plot
    make study-load ARMS="sum delta" DIGITS=8 SEEDS=0 STEPS=200
    make study-load-digits-8-steps-400-sum-0          # one run, with what it needs
    make plan-study-load                              # lists the runs, and what the rest will take

The task is that of `experiments.study.recall`, with a base model for every number of digits. An adapter is distilled
with W drawn per sample and countdowns for all windows, and measured at each; two arms are measured at other evict
ratios as well. ARMS, DIGITS and SEEDS leave runs out, and change none; the table has what there is. STEPS is part of a
run's name. Standard library only.
"""

import os
from dataclasses import dataclass

from experiments.rules import Run, options, python
from experiments.study.arms import LOAD_ARMS
from experiments.study.runs import DISTILL, SEEDS, Study

MOST = 10  # names that the task has words for
DIGITS = os.environ.get("DIGITS", "4 6 8 10").split()
STEPS = os.environ.get("STEPS", "400")
BASE_STEPS = os.environ.get("LOAD_BASE_STEPS")
OUTPUT = os.environ.get("RESULTS", "docs/results")
WINDOWS = ("8", "12", "16")  # measured at; training draws from 6 to 16
RATIOS, RATIO_ARMS = ("0.1", "0.5"), ("mlp", "mlp_any_ratio")  # measured at these evict ratios besides 0.25
ROWS = 25_600  # texts of 200 steps; then they are seen again
LONGEST = 96  # tokens of a thought of ten digits, and some more


@dataclass
class Load(Study):
    """A study with a folder for every number of digits, and a report of its own."""

    def table(self) -> Run:
        stem = f"{OUTPUT}/load_{STEPS}"
        report = python("experiments.study.load_report", self.folder, steps=STEPS, output=stem)
        return Run(f"{stem}.md", tuple(self.results), (report,))


def load() -> Study:
    """Every training, a measurement each, and the base's.

    Raises:
        SystemExit: digits that the task cannot have, or steps that are no number.
    """
    for digits in DIGITS:
        if not (digits.isdigit() and 1 <= int(digits) <= MOST):
            raise SystemExit(f"error: DIGITS={digits}: allowed are numbers from 1 to {MOST}")
    if not (STEPS.isdigit() and int(STEPS) > 0):
        raise SystemExit(f"error: STEPS={STEPS}: allowed is one number above 0")
    study = Load("load")
    for digits in DIGITS:
        add(study, digits)
    return study


def add(study: Study, digits: str) -> None:
    """The runs of one number of digits."""
    folder = f"{study.folder}/digits-{digits}"
    base, texts = f"{folder}/base", f"{folder}/completions.jsonl"
    make = python("experiments.study.recall", names=digits, windows=WINDOWS, steps=base_steps(digits), rows=ROWS)
    make += options(output=folder)
    study.runs.append(Run(f"{base}/config.json", commands=(make,), present=("$(READY)",)))
    needs = (f"{base}/config.json",)
    measure = python("experiments.study.evaluate", base=base, names=digits, windows=WINDOWS, output="$@")
    study.measure("base-0", needs, measure, folder=folder)
    command = python(DISTILL, config="recipes/study/recall_distill.yaml", model_name_or_path=base)
    command += options(completions=texts, max_steps=STEPS, max_completion_length=LONGEST)
    for seed in SEEDS:
        for arm in LOAD_ARMS:
            run = study.train(arm, seed, command, needs, folder=f"{folder}/steps-{STEPS}")
            name, trained, result = f"{arm.name}-{seed}", (f"{run}/manifest.json",), measure + options(adapter=run)
            study.measure(name, trained, result, folder=f"{folder}/steps-{STEPS}")
            for ratio in RATIOS if arm.name in RATIO_ARMS else ():
                at_ratio = result + options(evict_ratio=ratio)
                study.measure(name, trained, at_ratio, folder=f"{folder}/steps-{STEPS}/ratio-{ratio}")


def base_steps(digits: str) -> str:
    """Steps in which the base learns the task with the full cache; more digits take longer."""
    return BASE_STEPS or ("300" if int(digits) <= 4 else "600")
