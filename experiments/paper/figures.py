"""The paper's figures with ours in them: ours solid with standard errors, the paper's dashed in the same colour.

Windows stand side by side in the order of the paper, whatever budgets ours are; where those differ, the tick says so:
768 and below it (56). Points that are missing are left out.
"""

import textwrap
from math import nan
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.paper import histograms
from experiments.paper.captions import caption
from experiments.paper.layout import LAYOUTS, TITLE_OF_PANEL, label
from experiments.paper.results import Row, bin_width

# Okabe and Ito's colours, told apart with any kind of colour vision, and by their markers in grey.
STYLES = [
    ("#555555", "s"),
    ("#E69F00", "^"),
    ("#0072B2", "D"),
    ("#D55E00", "o"),
    ("#009E73", "v"),
    ("#CC79A7", "P"),
    ("#56B4E9", "X"),
]
METHODS = ("baseline", "lora", "lora_c", "pte")
PTE_ITSELF = ("pte", "global_32", "pte_sliding_window")  # the same setting under the name of each figure
SERIES = {"figure4a": "variant", "figure4b": "strategy"}  # the others: method
WINDOW = {"figure5": "max_generation_length"}  # the others: window
AXIS = {"figure5": "longest generation (tokens)"}


def draw(item: str, rows: list[Row], stand_in: dict, path: Path) -> Path:
    """The figure as a PNG at `path`.

    Raises:
        ValueError: the item is no figure.
    """
    drawn = figure(item, rows, stand_in)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110, metadata={"Software": None})
    return path


def figure(item: str, rows: list[Row], stand_in: dict) -> Figure:
    """The figure with its title, and below it whose numbers these are and what is missing."""
    if not item.startswith("figure"):
        raise ValueError(f"{item} is no figure")
    if item == "figure6":
        out = histograms.figure(rows, styles(item, rows), bin_width(stand_in))
    else:
        out = _curves(item, rows)
    width = int(out.get_figwidth() * 14)  # characters in a line
    note = "\n".join(line for text in caption(item, rows, stand_in, "left out") for line in textwrap.wrap(text, width))
    out.suptitle(LAYOUTS[item].title, x=0.01, ha="left", fontweight="bold")
    out.supxlabel(note, x=0.01, ha="left", fontsize=9)
    return out


def styles(item: str, rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each curve; a method, and PTE in its own setting, have the same ones everywhere."""
    fixed = dict(zip(METHODS, STYLES, strict=False)) | dict.fromkeys(PTE_ITSELF, STYLES[3])
    names = list(dict.fromkeys(row.keys[SERIES.get(item, "method")] for row in rows))
    free = iter([style for style in STYLES if style not in [fixed.get(name) for name in names]])
    return {name: fixed.get(name) or next(free) for name in names}


def _curves(item: str, rows: list[Row]) -> Figure:
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault((row.keys.get("panel"), row.keys.get("benchmark")), []).append(row)
    lines = len({panel for panel, _ in panels})
    columns = len(panels) // lines
    size = (2.7 * columns + 0.5, 2.7 * lines + 1.6) if columns > 1 else (9, 5.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    looks, ticks = styles(item, rows), _ticks(rows, item)
    for axis, ((panel, benchmark), within) in zip(axes.flat, panels.items(), strict=True):
        _panel(axis, item, within, looks, ticks)
        axis.set_title(" ".join(filter(None, [panel, benchmark and label(benchmark)])))
        if axis in axes[:, 0]:
            model = TITLE_OF_PANEL.get(panel, "").partition(", ")[2]
            axis.set_ylabel(f"{model}\naccuracy (%)".strip())
        if axis in axes[-1]:
            bracketed = ", ours in brackets" if any("(" in text for text in ticks.values()) else ""
            axis.set_xlabel(AXIS.get(item, "window (tokens)") + bracketed)
    _legend(figure, looks, beside=columns == 1)
    return figure


def _ticks(rows: list[Row], item: str) -> dict[str, str]:
    """The paper's x values in their order, and what stands below each."""
    key, out = WINDOW.get(item, "window"), {}
    for x in sorted({row.keys[key] for row in rows}, key=int):
        text = f"{int(x) // 1024}K" if item == "figure5" else x
        ours = sorted({row.at for row in rows if row.keys[key] == x and row.at is not None})
        out[x] = text if not ours or ours == [int(x)] else f"{text}\n({', '.join(map(str, ours))})"
    return out


def _panel(axis: Axes, item: str, rows: list[Row], looks: dict, ticks: dict[str, str]) -> None:
    key, logarithmic = WINDOW.get(item, "window"), item == "figure5"
    place = {x: int(x) if logarithmic else i for i, x in enumerate(ticks)}
    for name, (colour, marker) in looks.items():
        of_x = {row.keys[key]: row for row in rows if row.keys[SERIES.get(item, "method")] == name}
        curve = [of_x.get(x) for x in ticks]
        # A missing point is nan, so that the line is broken there instead of bridging it.
        paper = [nan if row is None or row.paper is None else row.paper for row in curve]
        ours = [nan if row is None or row.ours is None else row.ours for row in curve]
        errors = list(zip(*map(_error, curve), strict=True))  # two rows: below and above
        x = list(place.values())
        axis.plot(x, paper, "--", color=colour, marker=marker, mfc="none", ms=4, lw=1.2, alpha=0.75)
        axis.errorbar(x, ours, errors, color=colour, marker=marker, ms=5, lw=1.8, capsize=2.5)
    if logarithmic:
        axis.set_xscale("log", base=2)
    axis.set_xticks(list(place.values()), list(ticks.values()))
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _error(row: Row | None) -> tuple[float, float]:
    """How far the bar reaches below and above: the standard error, or the interval where the samples show none."""
    if row is None or row.ours is None:
        return 0.0, 0.0
    if row.se or row.low is None:
        return row.se or 0.0, row.se or 0.0
    return row.ours - row.low, row.high - row.ours


def _legend(figure: Figure, looks: dict[str, tuple[str, str]], beside: bool) -> None:
    handles = [
        *(Line2D([], [], color=colour, marker=mark, label=label(name)) for name, (colour, mark) in looks.items()),
        Line2D([], [], color="black", lw=1.8, label="ours ± se"),
        Line2D([], [], color="black", ls="--", lw=1.2, label="paper"),
    ]
    place, columns = ("outside right upper", 1) if beside else ("outside upper right", len(handles))
    figure.legend(handles=handles, loc=place, ncols=columns)
