"""The courses of a study's trainings: reward of GRPO, loss of distillation, step by step, mean and range of the seeds.

    python -m pte_trl.study.curves outputs/study/recall --output outputs/study/recall

Reads ARM-SEED/trainer_state.json, writes curves.png: a panel for the reward, a panel for the loss.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from pte_trl.study.report import ordered

LABELS = {"reward": "mean reward, GRPO", "loss": "KL to the full cache per token, distillation"}


def courses(folder: Path) -> dict[str, dict[str, list[list[tuple[int, float]]]]]:
    """metric -> arm -> one list of (step, value) per seed; the metric is reward, or loss where nothing is rewarded.

    Raises:
        ValueError: no finished training there.
    """
    found: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for path in sorted(folder.glob("*-*/trainer_state.json")):
        history = [entry for entry in json.loads(path.read_text())["log_history"] if "grad_norm" in entry]
        metric = "reward" if "reward" in history[0] else "loss"
        course = [(entry["step"], float(entry[metric])) for entry in history]
        found.setdefault(metric, {}).setdefault(path.parent.name.rpartition("-")[0], []).append(course)
    if not found:
        raise ValueError(f"{folder}: no finished trainings (ARM-SEED/trainer_state.json)")
    return found


def plot(found: dict[str, dict[str, list[list[tuple[int, float]]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4), layout="constrained", squeeze=False)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        found = courses(args.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    args.output.mkdir(parents=True, exist_ok=True)
    plot(found, args.output / "curves.png")


if __name__ == "__main__":
    main()
