"""The cache policy: how much of a text is kept, and which thought tokens leave when there is no more room.

A `CachePolicy` is what a recipe says. It becomes a `Schedule`, with W as a number, once the prompt is known. W follows
from a sample's own prompt and from nothing else, so it is the same in every batch and on any number of GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pte_trl.cache.eviction import Strategy, check_eviction
from pte_trl.cache.schedule import Schedule, check_evict_ratio


@dataclass(frozen=True)
class CachePolicy:
    """How much of the KV cache is kept (eq. 2 and section 4 of the paper). With no argument: all of it.

    Args:
        window: W, thought tokens kept besides the prompt; "auto" for as many as the prompt has. The paper trains with
            W = the longest question of the micro-batch; in a micro-batch of one prompt's completions that is the same.
        budget: tokens kept in all, prompt and thought (the paper's evaluation windows), instead of `window`.
        evict_ratio: rho, the share of a full window that leaves at once (0 < rho <= 1); the paper uses 0.25.
        eviction: which thought tokens leave: a key of `pte_trl.cache.eviction.STRATEGIES`, or a strategy with its own
            settings. Only the sliding window can be replayed, hence trained.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    window: int | Literal["auto"] | None = None
    budget: int | None = None
    evict_ratio: float = 0.25
    eviction: str | Strategy = "sliding_window"

    def __post_init__(self):
        if self.window is not None and self.budget is not None:
            raise ValueError(
                f"window={self.window!r}, budget={self.budget!r}: give at most one of the two; without both the cache "
                "is full"
            )
        if self.window is not None and self.window != "auto" and not _is_count(self.window, least=1):
            raise ValueError(
                f"window={self.window!r}: must be 'auto' or an integer of at least 1 (thought tokens kept)"
            )
        if self.budget is not None and not _is_count(self.budget, least=2):
            raise ValueError(
                f"budget={self.budget!r}: must be an integer of at least 2 (a prompt token and a thought token)"
            )
        check_evict_ratio(self.evict_ratio)
        check_eviction(self.eviction)
        if self.eviction != "sliding_window" and not self.bounded:
            raise ValueError(
                f"eviction={self.eviction!r}: nothing is evicted from a full cache; give a budget or a window with it"
            )

    @property
    def bounded(self) -> bool:
        """Whether anything is ever evicted; False for the full cache."""
        return self.window is not None or self.budget is not None

    def fits(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens leaves room for a thought."""
        return self.budget is None or prompt < self.budget

    def schedule(self, prompt: int) -> Schedule | None:
        """The evictions of a sample; None for the full cache.

        Args:
            prompt: tokens of its prompt.

        Raises:
            ValueError: the budget leaves no room for a thought.
        """
        if not self.bounded:
            return None
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
        """The evictions of samples whose W, (batch,), was decided when they were sampled."""
        windows = windows.tolist() if isinstance(windows, Tensor) else windows
        return [Schedule(window, self.evict_ratio) for window in windows]


FULL_CACHE = CachePolicy()


def _is_count(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
