"""The demo's figure: one sequence with what has left the cache, and the accuracy of every arm."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.demo.plan import NAMES

BASE, LORA, PTE, EVICTED = "#8c8c8c", "#d1752f", "#1f6fb4", "#e9e9e9"
COLOURS = (BASE, BASE, LORA, PTE, PTE)


def title(results: dict) -> str:
    """The finding, in this run's numbers."""
    by_name = {arm["name"].split(",")[0]: arm["accuracy"] for arm in results["arms"]}
    return (
        f"Digits that have left the KV cache: PTE recalls {by_name['PTE']:.0%}, LoRA {by_name['LoRA_c']:.0%}, "
        f"chance is {results['chance']:.0%}"
    )


def draw_sequence(axes: Axes, results: dict) -> None:
    """The tokens up to the first question, as boxes: evicted ones grey, those in the cache blue."""
    words, evicted = results["example"]["words"], results["example"]["evicted"][0]
    shown = words[1 : results["example"]["places"][0]]
    for at, word in enumerate(shown):
        gone, told, asked = at < evicted, at < NAMES, at == len(shown) - 1
        text = f"{word[0]}={word[1:]}" if told else f"{word}?" if asked else word.removeprefix("~")
        face, edge = (EVICTED, "#bbbbbb") if gone else ("#dcebf7", PTE)
        box = FancyBboxPatch((at + 0.08, 0), 0.84, 0.8, boxstyle="round,pad=0,rounding_size=0.12", fc=face, ec=edge)
        axes.add_patch(box)
        weight, colour = ("bold" if told or asked else "normal"), ("#777777" if gone and not told else "black")
        axes.text(at + 0.5, 0.4, text, ha="center", va="center", fontsize=8.5, weight=weight, color=colour)
    for start, stop, text, colour in (
        (0, evicted, "evicted from the cache", "#777777"),
        (evicted, len(shown), f"in the cache (window of {results['window']})", PTE),
    ):
        axes.plot([start + 0.1, stop - 0.1], [-0.25, -0.25], color=colour, linewidth=1.2)
        axes.text((start + stop) / 2, -0.42, text, ha="center", va="top", fontsize=9, color=colour)
    axes.set(xlim=(0, len(shown)), ylim=(-1.1, 1.1))
    axes.axis("off")


def draw_bars(axes: Axes, results: dict) -> None:
    """A bar per arm, the first at the top, and the accuracy of a guess."""
    arms = results["arms"]
    at = range(len(arms) - 1, -1, -1)
    accuracies = [arm["accuracy"] for arm in arms]
    axes.barh(at, accuracies, height=0.66, color=COLOURS)
    for y, accuracy in zip(at, accuracies, strict=True):
        axes.text(accuracy + 0.01, y, f"{accuracy:.0%}", va="center", fontsize=10)
    axes.axvline(results["chance"], color="0.35", linestyle="--", linewidth=1)
    axes.text(results["chance"] + 0.01, len(arms) - 0.52, "chance", color="0.35", fontsize=9, va="bottom")
    axes.set_yticks(at, [arm["name"] for arm in arms], fontsize=10)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set(xlim=(0, 1.08), ylim=(-0.6, len(arms) - 0.1))
    axes.set_xlabel(f"digits right, {results['sequences']} unseen sequences", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(left=False)


def draw_figure(results: dict) -> Figure:
    """The figure of what `experiments.demo.measure.measure` returns."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.6, 4.4), height_ratios=(1, 2.6), layout="constrained")
    figure.suptitle(title(results), fontsize=12, weight="bold")
    draw_sequence(top, results)
    draw_bars(bottom, results)
    return figure
