"""The courses of a study's trainings: reward of GRPO, loss of distillation, step by step, mean and range of the seeds.

A panel for the reward, a panel for the loss, from ARM-SEED/trainer_state.json; `experiments.study.report` draws them.
"""

import json
from pathlib import Path
from statistics import fmean

from experiments.study.arms import ordered
from pte_trl.inspect.plots import subplots

LABELS = {"reward": "mean reward, GRPO", "loss": "KL to the full cache per token, distillation"}


def courses(folder: Path) -> dict[str, dict[str, list[list[tuple[int, float]]]]]:
    """metric -> arm -> one list of (step, value) per seed; the metric is reward, or loss where nothing is rewarded."""
    found: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for path in sorted(folder.glob("*-*/trainer_state.json")):
        history = [entry for entry in json.loads(path.read_text())["log_history"] if "grad_norm" in entry]
        metric = "reward" if "reward" in history[0] else "loss"
        course = [(entry["step"], float(entry[metric])) for entry in history]
        found.setdefault(metric, {}).setdefault(path.parent.name.rpartition("-")[0], []).append(course)
    return found


def plot(found: dict[str, dict[str, list[list[tuple[int, float]]]]], path: Path) -> None:
    figure, axes = subplots(1, len(found), size=(6.5 * len(found), 4), squeeze=False)
    for axis, (metric, arms) in zip(axes[0], sorted(found.items()), strict=True):
        for index, arm in enumerate(ordered(arms)):
            steps = [step for step, _ in arms[arm][0]]
            values = list(zip(*([value for _, value in course] for course in arms[arm]), strict=True))
            axis.plot(steps, [fmean(row) for row in values], color=f"C{index}", label=arm)
            axis.fill_between(
                steps, *zip(*((min(r), max(r)) for r in values), strict=True), color=f"C{index}", alpha=0.2
            )
        axis.set(xlabel="step", ylabel=LABELS[metric], ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
