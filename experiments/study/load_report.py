"""The load curves of experiments/study/load.py: recall against digits, and what a step of each arm costs.

    python -m experiments.study.load_report outputs/study/load --steps 400 --output docs/results/load_400

Writes OUTPUT.md, two tables, and OUTPUT.png, a panel for every window. What there is of the results is shown, with the
number of seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from experiments.study.arms import ordered
from experiments.study.recall import CHANCE
from experiments.study.report import Spread, read
from pte_trl import markdown
from pte_trl.inspect.plots import subplots

COLOURS = (*(f"C{n}" for n in range(10) if n != 7), "black", "gold")  # the seventh is the base's grey
Curves = dict[int, dict[str, dict[str, Spread]]]  # digits -> arm -> window -> accuracy


def curves(folder: Path, steps: int) -> Curves:
    """The results of so many steps, and the base's.

    Raises:
        ValueError: there are none.
    """
    found: Curves = {}
    for path in sorted(folder.glob("digits-*"), key=digits_of):
        arms: dict[str, dict[str, Spread]] = {}
        for results in (path / "results", path / f"steps-{steps}/results"):
            if any(results.glob("*-*.json")):
                arms |= read(results)["accuracy"]
        if set(arms) - {"base"}:
            found[digits_of(path)] = arms
    if not found:
        raise ValueError(f"{folder}: no results of {steps} steps")
    return found


def digits_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def seconds(folder: Path, steps: int) -> dict[int, dict[str, Spread]]:
    """Digits -> arm -> seconds of a training step, a value per seed: the whole training over its steps."""
    found: dict[int, dict[str, list[float]]] = {}
    for path in sorted(folder.glob(f"digits-*/steps-{steps}/*-*/trainer_state.json")):
        state = json.loads(path.read_text())
        took = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
        if took:
            arms = found.setdefault(digits_of(path.parents[2]), {})
            arms.setdefault(path.parent.name.rpartition("-")[0], []).append(took[-1] / state["global_step"])
    return {d: {arm: Spread(tuple(values)) for arm, values in found[d].items()} for d in sorted(found)}


def accuracy_table(found: Curves) -> str:
    windows = list(dict.fromkeys(w for arms in found.values() for row in arms.values() for w in row))
    head = ["arm", "digits", "seeds", *(f"W = {w}" if w.isdigit() else f"{w} cache" for w in windows)]
    rows = []
    for arm in ordered({arm for arms in found.values() for arm in arms}):
        for digits, arms in found.items():
            if arm in arms:
                seeds = len(next(iter(arms[arm].values())).values)
                cells = [str(arms[arm].get(window, "-")) for window in windows]
                rows.append([arm, str(digits), str(seeds), *cells])
    return markdown.table(head, rows)


def cost_table(found: dict[int, dict[str, Spread]]) -> str:
    """Seconds of a step by digits, and all of them over the first arm's."""
    arms = ordered({arm for each in found.values() for arm in each})
    rows = []
    for arm in arms:
        shares = [each[arm].mean / each[arms[0]].mean for each in found.values() if {arm, arms[0]} <= set(each)]
        ratio = f"{fmean(shares):.2f}" if shares else "-"
        rows.append([arm, *(str(each.get(arm, "-")) for each in found.values()), ratio])
    return markdown.table(["seconds a step", *(f"{digits} digits" for digits in found), f"over {arms[0]}"], rows)


def text(found: Curves, costs: dict[int, dict[str, Spread]], steps: int) -> str:
    parts = [
        f"# Load curves, {steps} steps",
        "Answers right on the recall task (`experiments/study/load.py`), one adapter for all windows. ± is the "
        f"standard deviation over the seeds. Chance is {CHANCE:.2f}.",
        accuracy_table(found),
    ]
    if costs:
        parts += ["What a training step takes.", cost_table(costs)]
    return "\n\n".join(parts) + "\n"


def plot(found: Curves, path: Path) -> None:
    """A panel for every window: the mean of the seeds, and their range."""
    windows = list(dict.fromkeys(w for arms in found.values() for row in arms.values() for w in row))
    figure, axes = subplots(1, len(windows), size=(4.2 * len(windows), 4), sharey=True, squeeze=False)
    arms = ordered({arm for each in found.values() for arm in each})
    for axis, window in zip(axes[0], windows, strict=True):
        for arm in arms:
            points = [(d, each[arm][window]) for d, each in found.items() if window in each.get(arm, {})]
            if not points:
                continue
            digits, spreads = zip(*points, strict=True)
            colour = "0.5" if arm == "base" else COLOURS[arms.index(arm) % len(COLOURS)]
            axis.plot(digits, [spread.mean for spread in spreads], ".-", color=colour, label=arm)
            low, high = zip(*((min(s.values), max(s.values)) for s in spreads), strict=True)
            axis.fill_between(digits, low, high, color=colour, alpha=0.15)
        axis.axhline(CHANCE, color="0.4", linestyle="--", linewidth=1)
        axis.set(xlabel="digits to remember", xticks=list(found), ylim=(0, 1.02))
        axis.set_title(f"W = {window}" if window.isdigit() else f"{window} cache")
    axes[0][0].set_ylabel("answers right; dashed: chance")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(arms))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="without .md and .png")
    args = parser.parse_args()
    try:
        found = curves(args.folder, args.steps)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(found, args.output.with_suffix(".png"))
    written = text(found, seconds(args.folder, args.steps), args.steps)
    args.output.with_suffix(".md").write_text(written)
    print(written, end="")


if __name__ == "__main__":
    main()
