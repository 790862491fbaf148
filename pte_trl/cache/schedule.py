"""The arithmetic of windows and evictions (eq. 2, cache policy D). Pure: every other part asks it, none repeats it.

Thought tokens are counted from 0. Prompt tokens stay for ever and are not counted. A token is *fed* when the
model computes its keys and values; if the window is full at that moment, the oldest E thought tokens leave first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

Index = TypeVar("Index", int, torch.Tensor)


@dataclass(frozen=True)
class Schedule:
    """When which thought token leaves.

    Args:
        window: W, the most thought tokens kept at once (>= 1).
        evict_ratio: rho, the share of the window that leaves when it is full (0 < rho <= 1); the paper uses 0.25.

    Every method takes an `int` or an integer tensor of any shape where the annotation says `Index`.
    """

    window: int
    evict_ratio: float = 0.25

    def __post_init__(self):
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window={self.window!r}: must be an integer of at least 1 (thought tokens kept)")
        if not is_evict_ratio(self.evict_ratio):
            raise ValueError(f"evict_ratio={self.evict_ratio!r}: must be a number above 0 and at most 1")

    @classmethod
    def of(cls, window: int, evict: int) -> "Schedule":
        """By E, 1 <= E <= W, instead of rho."""
        return cls(window, evict / window)

    @cached_property  # asked for several times per layer and token
    def evict(self) -> int:
        """E = ceil(rho * W), tokens that leave together. 1 <= E <= W."""
        # round() first: 0.1 * 30 is 3.0000000000000004 and must give 3, not 4.
        return min(self.window, max(1, math.ceil(round(self.evict_ratio * self.window, 9))))

    def evictions_before(self, i: Index) -> Index:
        """k(i): evictions that have happened once thought token `i` is fed. It decodes under the state S_k(i)."""
        late = (i - self.window) // self.evict + 1
        return late.clamp(min=0) if isinstance(i, torch.Tensor) else max(0, late)

    def first_visible(self, i: Index) -> Index:
        """start(i): the oldest thought token that token `i` attends to; it sees start(i) .. i and the prompt."""
        return self.evictions_before(i) * self.evict

    def evicted_by(self, k: int) -> range:
        """Thought tokens that the `k`-th eviction (k = 1, 2, ...) drops: [(k-1)E, kE)."""
        return range((k - 1) * self.evict, k * self.evict)

    def decoded_under(self, k: int) -> range:
        """Thought tokens fed while the state is S_k; for k = 0 the first W."""
        if k == 0:
            return range(0, self.window)
        return range(self.window + (k - 1) * self.evict, self.window + k * self.evict)

    def evictions(self, fed: int) -> int:
        """Evictions after `fed` thought tokens have been fed (a completion of n sampled tokens feeds n - 1)."""
        return self.evictions_before(fed - 1) if fed > 0 else 0

    def room(self, fed: int) -> int:
        """How many tokens can be fed next, after `fed`, before an eviction falls *between* two of them (>= 1).

        The eviction that must happen before the first of them is not counted: it happens before the chunk.
        """
        return self.decoded_under(self.evictions_before(fed)).stop - fed

    def chunks(self, length: int) -> list[range]:
        """`length` thought tokens as the longest runs that no eviction interrupts."""
        runs, at = [], 0
        while at < length:
            runs.append(range(at, min(length, at + self.room(at))))
            at = runs[-1].stop
        return runs


def packed(schedules: Sequence[Schedule]) -> torch.Tensor:
    """Schedules as integers that travel with a batch's samples: (samples, 2), W and E."""
    return torch.tensor([(s.window, s.evict) for s in schedules], dtype=torch.long).view(-1, 2)


def unpacked(pairs: torch.Tensor) -> list[Schedule]:
    """The schedules again. Those of equal W and E are equal, whatever rho they were made with."""
    return [Schedule.of(window, evict) for window, evict in pairs.tolist()]


def is_evict_ratio(value) -> bool:
    """Whether a value is a share of a window that can leave."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
