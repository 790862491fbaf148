"""The cache policy: how much of a text is kept, and which thought tokens leave when there is no more room.

A `CachePolicy` is what a recipe says. It becomes a `Schedule`, with W as a number, once the prompt is known. W follows
from a sample's own prompt and from nothing else, so it is the same in every batch and on any number of GPUs. Where a
recipe gives a range, `draw` first makes a policy with one W and one rho of it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from pte_trl.cache.eviction import Strategy, check_eviction
from pte_trl.cache.schedule import Schedule, is_evict_ratio


@dataclass(frozen=True)
class CachePolicy:
    """How much of the KV cache is kept (eq. 2 and section 4 of the paper). With no argument: all of it.

    Args:
        window: W, thought tokens kept besides the prompt; "auto" for as many as the prompt has. The paper trains with
            W = the longest question of the micro-batch; in a micro-batch of one prompt's completions that is the same.
            Two numbers, the smaller first, are a range: log-uniform over the whole numbers, both ends included.
        budget: tokens kept in all, prompt and thought (the paper's evaluation windows), instead of `window`.
        evict_ratio: rho, the share of a full window that leaves at once (0 < rho <= 1); the paper uses 0.25. Two
            numbers, the smaller first, are a range, uniform.
        eviction: which thought tokens leave: a key of `pte_trl.cache.eviction.STRATEGIES`, or a strategy with its own
            settings. Only the sliding window can be replayed, hence trained.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    window: int | tuple[int, int] | Literal["auto"] | None = None
    budget: int | None = None
    evict_ratio: float | tuple[float, float] = 0.25
    eviction: str | Strategy = "sliding_window"

    def __post_init__(self):
        for key in ("window", "evict_ratio"):
            if isinstance(getattr(self, key), list):  # as YAML and flags give a range
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.window is not None and self.budget is not None:
            raise ValueError(
                f"window={self.window!r}, budget={self.budget!r}: give at most one of the two; without both the cache "
                "is full"
            )
        if self.window is not None and self.window != "auto" and not _in_order(self.window, _is_window):
            raise ValueError(
                f"window={self.window!r}: must be 'auto' or an integer of at least 1 (thought tokens kept), or two, "
                "the smaller first, to draw from"
            )
        if self.budget is not None and not _is_count(self.budget, least=2):
            raise ValueError(
                f"budget={self.budget!r}: must be an integer of at least 2 (a prompt token and a thought token)"
            )
        if not _in_order(self.evict_ratio, is_evict_ratio):
            raise ValueError(
                f"evict_ratio={self.evict_ratio!r}: must be a number above 0 and at most 1, or two, the smaller "
                "first, to draw from"
            )
        check_eviction(self.eviction)
        if self.eviction != "sliding_window" and not self.bounded:
            raise ValueError(
                f"eviction={self.eviction!r}: nothing is evicted from a full cache; give a budget or a window with it"
            )

    @property
    def bounded(self) -> bool:
        """Whether anything is ever evicted; False for the full cache."""
        return self.window is not None or self.budget is not None

    @property
    def drawn(self) -> bool:
        """Whether W or rho is a range."""
        return self.bounded and (isinstance(self.window, tuple) or isinstance(self.evict_ratio, tuple))

    def at(self, window: float, ratio: float) -> "CachePolicy":
        """The policy with one W and one rho: those at two quantiles, 0 to 1, of their ranges.

        `at(0, 0)` has the smallest of both, `at(1, 1)` the largest, `at(0.5, 0.5)` the medians.
        """
        changes = {}
        if isinstance(self.window, tuple):
            low, high = self.window
            # W is k where the quantile falls between log k and log (k + 1): log-uniform on whole numbers.
            changes["window"] = min(high, int(low * ((high + 1) / low) ** window))
        if isinstance(self.evict_ratio, tuple):
            low, high = self.evict_ratio
            changes["evict_ratio"] = min(high, low + (high - low) * ratio)
        return replace(self, **changes) if changes else self

    def draw(self, key: str) -> "CachePolicy":
        """The policy with one W and one rho, drawn from their ranges.

        Args:
            key: decides the draw, alone and the same on every machine: no generator's state does.
        """
        generator = random.Random(key)
        return self.at(generator.random(), generator.random())

    def fits(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens leaves room for a thought."""
        return self.budget is None or prompt < self.budget

    def schedule(self, prompt: int) -> Schedule | None:
        """The evictions of a sample; None for the full cache.

        Args:
            prompt: tokens of its prompt.

        Raises:
            ValueError: the budget leaves no room for a thought; W or rho is a range.
        """
        if not self.bounded:
            return None
        if self.drawn:
            raise ValueError(
                f"window={self.window!r}, evict_ratio={self.evict_ratio!r}: a range gives no schedule; allowed are "
                "single values, such as `draw` makes of it"
            )
        if self.budget is None:
            window = max(1, prompt) if self.window == "auto" else self.window
        elif self.fits(prompt):
            window = self.budget - prompt
        else:
            raise ValueError(
                f"budget={self.budget}: nothing is left for the thought, a prompt has {prompt} tokens; allowed is "
                f"{prompt + 1} or more, or a lower max_prompt_tokens"
            )
        return Schedule(window, self.evict_ratio)

    def schedules(self, windows: Tensor | Sequence[int]) -> list[Schedule]:
        """The evictions of samples whose W, (batch,), was decided when they were sampled; rho is not a range."""
        windows = windows.tolist() if isinstance(windows, Tensor) else windows
        return [Schedule(window, self.evict_ratio) for window in windows]


def _in_order(value, allowed: Callable[[Any], bool]) -> bool:
    """Whether a value is allowed, or is two that are, the smaller first."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(map(allowed, value)) and value[0] <= value[1]
    return allowed(value)


def _is_window(value) -> bool:
    return _is_count(value, least=1)


def _is_count(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


FULL_CACHE = CachePolicy()
