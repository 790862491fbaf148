"""The cache policy as keys of a recipe and as flags."""

from dataclasses import dataclass, field

from pte_trl.cache.policy import CachePolicy


@dataclass
class CacheArguments:
    """Base of every config class that has a cache policy; TrlParser reads its fields."""

    window: int | None = field(default=None, metadata={"help": "W, thought tokens kept, instead of budget."})
    budget: int | None = field(default=None, metadata={"help": "Prompt and thought tokens kept, instead of window."})
    evict_ratio: float = field(default=0.25, metadata={"help": "Share of a full window that leaves at once."})

    @property
    def cache_policy(self) -> CachePolicy:
        """The keys as one object.

        Raises:
            ValueError: as `CachePolicy`.
        """
        return CachePolicy(self.window, self.budget, self.evict_ratio)
