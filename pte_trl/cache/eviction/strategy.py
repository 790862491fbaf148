"""What an eviction strategy decides: how many entries every kv head may keep, and which of them leave."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Strategy:
    """Every kv head keeps `window` thought entries and the oldest leave; a strategy overrides what it does otherwise.

    An *entry* is one token's key and value in one kv head. Evictions are those of `Schedule`, head by head: a head
    that holds its capacity C when a token is to be fed loses ceil(ratio * C) entries first.
    """

    def prepare(self, model: nn.Module) -> None:
        """Called with the model, in eval mode, before a cache is made; for what is measured on the model."""

    def shares(self, layers: int, heads: int, window: int, longest: int | None) -> Tensor:
        """Wished-for capacities, (layers, 1) or (layers, kv heads), above 0, with `window` as their mean."""
        return torch.full((layers, 1), float(window), dtype=torch.float64)

    def capacities(self, layers: int, heads: int, window: int, longest: int | None = None) -> list[list[int]]:
        """Thought entries that every (layer, kv head) may keep.

        Args:
            layers, heads: decoder layers and kv heads per layer of the model.
            window: W, the mean capacity.
            longest: thought tokens that will be fed at most, if known. No head is given more, so that nothing is
                wasted; with W >= longest nothing is ever evicted.

        Returns:
            `layers` rows of `heads` integers of at least 1; their sum is exactly layers * heads * window.
        """
        if longest is not None and window >= longest:
            return [[window] * heads for _ in range(layers)]
        shares = self.shares(layers, heads, window, longest)
        counts = apportion(shares.flatten(), shares.numel() * window, longest or math.inf)
        return counts.view(shares.shape).expand(layers, heads).tolist()

    def remember(self, past: Tensor | None, now: Tensor) -> Tensor | None:
        """What the strategy keeps of the attention that the kept entries have received.

        Args:
            past: what it returned last time, (batch, kv heads, q, kept), with zeros for the token fed since; None
                at the first thought token.
            now: (batch, kv heads, 1, kept) attention probabilities of the token just fed, summed over the query
                heads of each kv head; 0 where an entry is dead.

        Returns:
            (batch, kv heads, q, kept), any q; None if the strategy needs no attention.
        """
        return None

    def order(self, past: Tensor | None, alive: Tensor, age: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor]:
        """Who leaves first: unprotected before protected entries, then the lowest score, then the oldest.

        Args:
            past: as `remember` left it.
            alive: (batch, kv heads, kept), entries that are there; what is returned for others does not matter.
            age: (batch, 1, kept), 0 for the thought token fed last, 1 for the one before; any value where dead.
            capacity: (kv heads, 1).

        Returns:
            Scores and whether an entry is protected, both (batch, kv heads, kept).
        """
        return alive.new_zeros(alive.shape, dtype=torch.float32), torch.zeros_like(alive)


def apportion(shares: Tensor, total: int, most: float) -> Tensor:
    """Integers near `shares` with a given sum, by largest remainders.

    Args:
        shares: (n,) above 0. Where one would be below 1 or above `most`, it is held there and the others are scaled.
        total: the sum, between n and n * most.
        most: upper bound of each.

    Returns:
        (n,) int64; a larger share never gets less than a smaller one.
    """

    def bounded(scale: float) -> Tensor:
        return (shares * scale).clamp(1, most)

    low, high = 0.0, total / shares.min().item()
    for _ in range(200):  # the sum grows with the scale: bisection
        middle = (low + high) / 2
        low, high = (middle, high) if bounded(middle).sum() < total else (low, middle)
    # 4.9999999 means 5: the bisection ends within rounding
    exact = (bounded(high) * 1e6).round() / 1e6
    counts = exact.floor().long()
    missing = total - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts
