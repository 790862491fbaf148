"""The tables and plots of a study, from its result files: mean and spread over the seeds.

    python -m experiments.study.report outputs/study/recall/results --output outputs/study/recall

Writes table.md and plot.png, and curves.png where the folder around the results holds trainings. A result file is
ARM-SEED.json; its "values" have, by window, a share or {"kl": ...}.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from experiments.study import curves
from experiments.study.arms import ordered
from pte_trl import markdown
from pte_trl.inspect.plots import subplots


@dataclass(frozen=True)
class Spread:
    """Args: values: one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of one."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


def read(folder: Path) -> dict[str, dict[str, dict[str, Spread]]]:
    """metric -> arm -> window -> spread.

    Raises:
        ValueError: no results, or files of one arm that differ in their windows.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(folder.glob("*-*.json")):
        arm = path.stem.rpartition("-")[0]
        for window, value in json.loads(path.read_text())["values"].items():
            metrics = {"accuracy": value} if isinstance(value, float) else {m: v["mean"] for m, v in value.items()}
            for metric, number in metrics.items():
                values.setdefault((metric, arm, window), []).append(number)
    if not values:
        raise ValueError(f"{folder}: no results (ARM-SEED.json)")
    found: dict[str, dict[str, dict[str, Spread]]] = {}
    for (metric, arm, window), numbers in values.items():
        found.setdefault(metric, {}).setdefault(arm, {})[window] = Spread(tuple(numbers))
    for metric, arms in found.items():
        for arm, windows in arms.items():
            counts = {window: len(spread.values) for window, spread in windows.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"{folder}: {metric} of {arm} has different numbers of seeds by window: {counts}")
    return found


def table(metric: str, arms: dict[str, dict[str, Spread]]) -> str:
    """Markdown: an arm a row, a window a column, mean ± standard deviation over the seeds."""
    windows = list(dict.fromkeys(window for row in arms.values() for window in row))
    head = [metric, "seeds", *(f"W = {w}" if w.isdigit() else f"{w} cache" for w in windows)]
    rows = []
    for arm in ordered(arms):
        seeds = len(next(iter(arms[arm].values())).values)
        cells = [str(arms[arm].get(window, "-")) for window in windows]
        rows.append([arm, str(seeds), *cells])
    return markdown.table(head, rows)


def gap_closed(arms: dict[str, dict[str, Spread]], ours: str = "pte_distilled", control: str = "lora_c_distilled"):
    """Lines that say which share of the KL that the control leaves is closed, by window; none without both arms."""
    if ours not in arms or control not in arms:
        return []
    shares = {w: 1 - arms[ours][w].mean / spread.mean for w, spread in arms[control].items() if w in arms[ours]}
    return [f"W = {w}: {ours} closes {100 * share:.0f} % of what {control} leaves" for w, share in shares.items()]


def gaps_closed(found: dict[str, dict[str, dict[str, Spread]]]) -> list[str]:
    """`gap_closed` of every KL that was measured."""
    return [f"{metric}, {line}" for metric in found if metric.startswith("kl") for line in gap_closed(found[metric])]


def plot(found: dict[str, dict[str, dict[str, Spread]]], path: Path, chance: float | None = None) -> None:
    """A panel per metric, two in a row: bars by window, a bar per arm, the seeds as dots; an accuracy's `chance`."""
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, axes = subplots(rows, columns, size=(8 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (metric, arms) in zip(axes.flat, found.items(), strict=False):
        names = ordered(arms)
        windows = list(dict.fromkeys(window for row in arms.values() for window in row))
        width = 0.8 / len(names)
        for index, arm in enumerate(names):
            at = [n + (index - (len(names) - 1) / 2) * width for n, w in enumerate(windows) if w in arms[arm]]
            spreads = [arms[arm][w] for w in windows if w in arms[arm]]
            axis.bar(at, [s.mean for s in spreads], width * 0.9, label=arm, color=f"C{index}", alpha=0.7)
            for x, spread in zip(at, spreads, strict=True):
                axis.plot([x] * len(spread.values), spread.values, ".", color="black", markersize=3)
        axis.set_xticks(range(len(windows)), [f"W = {w}" if w.isdigit() else f"{w} cache" for w in windows])
        axis.set(ylabel=metric, title=f"{metric.replace('_', ' ')}; dots are seeds")
        if metric == "accuracy" and chance is not None:
            axis.axhline(chance, color="0.4", linestyle="--", linewidth=1)
            axis.text(-0.45, chance + 0.015, "chance", color="0.4", fontsize=8)
    bars = axes.flat[0].get_legend_handles_labels()
    figure.legend(*bars, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--chance", type=float, help="accuracy of a guess, for the plot")
    args = parser.parse_args()
    try:
        found = read(args.results)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    text = "\n\n".join(table(metric, arms) for metric, arms in found.items())
    text = "\n\n".join([text, *gaps_closed(found)]) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(text)
    plot(found, args.output / "plot.png", args.chance)
    if courses := curves.courses(args.results.parent):
        curves.plot(courses, args.output / "curves.png")
    print(text, end="")


if __name__ == "__main__":
    main()
