"""Figure 6: how long correct responses are, one panel per method, ours as bars and the paper's as a dashed outline."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.layout import label
from experiments.paper.results import Row, bin_edges


def figure(rows: list[Row], looks: dict[str, tuple[str, str]], bin_width: float) -> Figure:
    """The panels; bins from six widths up, the paper's long responses, are shaded and their sums written in."""
    methods = list(dict.fromkeys(row.keys["method"] for row in rows))
    out = Figure(figsize=(9.5, 7.5), layout="constrained")
    axes = out.subplots(-(-len(methods) // 2), 2, squeeze=False, sharex=True, sharey=True)
    for axis, method in zip(axes.flat, methods, strict=False):
        _panel(axis, [row for row in rows if row.keys["method"] == method], looks[method][0], bin_width)
        axis.set_title(label(method))
    for axis in axes.flat[len(methods) :]:
        axis.set_visible(False)
    tallest = max(
        (value for row in rows if row.keys["bin"] != "long" for value in (row.ours, row.paper) if value), default=1
    )
    axes[0, 0].set_ylim(0, 1.4 * tallest)  # room for what is written above the bars; the panels share it
    for axis in axes[:, 0]:
        axis.set_ylabel("share of correct responses (%)")
    for axis in axes[-1]:
        axis.set_xlabel("generated tokens" + ("" if bin_width == 100 else ": the paper's, ours in brackets"))
    return out


def _panel(axis: Axes, rows: list[Row], colour: str, bin_width: float) -> None:
    bins = [row for row in rows if row.keys["bin"] != "long"]
    (long,) = (row for row in rows if row.keys["bin"] == "long")
    places = range(len(bins))
    if any(row.ours is not None for row in bins):
        axis.bar(places, [row.ours for row in bins], 0.9, color=colour, alpha=0.75, label="ours")
    heights = [row.paper or 0.0 for row in bins]
    axis.stairs(
        heights, [place - 0.5 for place in range(len(bins) + 1)], color="black", ls="--", lw=1.3, label="paper"
    )
    edges = [bin_edges(row.keys["bin"]) for row in bins]
    axis.axvspan([low for low, _ in edges].index(6.0) - 0.5, len(bins) - 0.5, color="black", alpha=0.08, lw=0)
    axis.set_xticks([p - 0.5 for p in range(len(edges))], [_tick(low, bin_width) for low, _ in edges], fontsize=8)
    axis.text(0.98, 0.96, _long(long), transform=axis.transAxes, ha="right", va="top")
    axis.legend(loc="upper left")
    axis.margins(x=0.01)
    axis.grid(axis="y", alpha=0.25)


def _tick(low: float, bin_width: float) -> str:
    """Where a bin starts, in tokens."""
    return f"{100 * low:.0f}" + ("" if bin_width == 100 else f"\n({bin_width * low:.1f})")


def _long(row: Row) -> str:
    lines = ["long responses (shaded)", f"paper {row.paper:.1f} %" if row.paper is not None else ""]
    if row.ours is not None:
        lines.append(f"ours {row.ours:.1f} % ({round(row.ours * row.samples / 100)} of {row.samples})")
    return "\n".join(filter(None, lines))
