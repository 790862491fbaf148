"""The pictures of `pte_trl.inspect.states`. matplotlib is an optional extra, so it is imported when one is drawn."""

from pathlib import Path

import torch

from pte_trl.settings.extras import check_extra


def draw(found: dict, words: list[str], folder: Path) -> None:
    """states.png, tokens.png and distance.png."""
    for name, make in (("states", states), ("tokens", tokens), ("distance", distance)):
        make(found, words).savefig(folder / f"{name}.png", dpi=130)


def subplots(*shape: int, size: tuple[float, float], **options):
    """A figure of `size` inches and its axes: pyplot's `subplots` without a backend and without state to close.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_extra("matplotlib", "a figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def states(found: dict, words: list[str]):
    """|S'| / |S|, and how far S turns, over the evictions, a line per layer."""
    figure, axes = subplots(1, 3, size=(12, 3.6))
    from matplotlib import colormaps

    titles = {
        "update_over_state": "size of the update over that of S",
        "cosine_to_last": "cosine of S with the S before",
        "cosine_to_start": "cosine of S with S before any eviction",
    }
    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(found["layers"])).numpy())
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for index, (layer, colour) in enumerate(zip(found["layers"], colours, strict=True)):
            label = f"layer {index}" if index in (0, len(found["layers"]) - 1) else None
            axis.plot(range(1, found["evictions"] + 1), layer[key], color=colour, marker=".", label=label)
        axis.set(xlabel="eviction", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend(frameon=False)
    return figure


def tokens(found: dict, words: list[str]):
    """How far every evicted token moved S, layer by layer, and the words that moved it furthest."""
    shares = torch.tensor([layer["token_moved"] for layer in found["layers"]]).flatten(1)
    places = torch.tensor(found["evicted"]).flatten()
    figure, (top, bottom) = subplots(2, 1, size=(12, 6))
    limit = shares.abs().max().item()
    extent = (-0.5, len(places) - 0.5, len(shares) - 0.5, -0.5)
    image = top.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
    for k in range(1, found["evictions"]):
        top.axvline(k * found["evict"] - 0.5, color="0.5", linewidth=0.5)
    top.set(ylabel="layer", xlabel="evicted token, in order", title="each token's part of |S'| / |S|")
    top.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=top)
    mean = shares.mean(0)
    best = mean.topk(min(25, len(mean))).indices.tolist()
    labels = [f"{_plain(words[places[i]])} ({places[i].item()})" for i in best]
    bottom.bar(range(len(best)), mean[best].tolist(), color="C0")
    bottom.set_xticks(range(len(best)), labels, rotation=60, ha="right")
    bottom.set(ylabel="part of |S'| / |S|, mean over layers")
    bottom.set_title("the evicted tokens that moved S most (place in the thought)")
    return figure


def distance(found: dict, words: list[str]):
    """KL to the full-cache policy along the completion, and by tokens since the last eviction."""
    kl, since = torch.tensor(found["kl"]), torch.tensor(found["since_eviction"])
    figure, (left, right) = subplots(1, 2, size=(12, 3.6))
    left.plot(kl.clamp(min=1e-9), color="C0", linewidth=0.8)
    for k in range(found["evictions"]):
        left.axvline(found["window"] + k * found["evict"] + 1, color="0.8", linewidth=0.8, zorder=0)
    left.set(
        xlabel="completion token", ylabel="nats", yscale="log", title="KL(full cache || bounded); lines: evictions"
    )
    late = since >= 0
    right.scatter(since[late], kl[late].clamp(min=1e-9), s=6, color="0.7", label="a token")
    means = sorted((d, v) for d, v in found["kl_by_distance"].items() if d >= 0)
    right.plot(*zip(*means, strict=True), color="C3", marker=".", label="mean")
    right.set(xlabel="tokens since the last eviction", ylabel="nats", yscale="log", title="KL by distance")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(frameon=False)
    return figure


def _plain(word: str) -> str:
    """Readable, and nothing that matplotlib takes for mathematics."""
    return repr(word)[1:-1].replace("$", r"\$")
