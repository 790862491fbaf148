"""H2O: heavy hitters, and the most recent."""

from dataclasses import dataclass

from torch import Tensor

from pte_trl.cache.eviction.strategy import Strategy


@dataclass
class H2O(Strategy):
    """Entries that have received the least attention since they came leave; the most recent are protected.

    Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv
    2306.14048, its eviction algorithm. The score of an entry is the sum of the attention probabilities that all
    queries from its own token on have given it, each under the entries kept at that time.

    Args:
        recent: share of a head's capacity that is protected because it is recent; the rest is for heavy hitters.
            0.5 is the paper's even split.

    Adaptations: the prompt is never evicted, so only thoughts compete; a quarter (`evict_ratio`) leaves at once
    instead of one entry per token; with grouped queries the score is the sum over the query heads of a kv head.
    """

    recent: float = 0.5

    def __post_init__(self):
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent={self.recent!r}: must be at least 0 and below 1 (a share of the capacity)")

    def remember(self, past: Tensor | None, now: Tensor) -> Tensor:
        return now if past is None else past + now

    def order(self, past: Tensor, alive: Tensor, age: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor]:
        protected = (age < (self.recent * capacity).floor()).expand_as(alive)
        return past.squeeze(2).masked_fill(protected, 0), protected
