"""The cache policy as keys of a recipe and as flags."""

from dataclasses import dataclass, field

from pte_trl.cache.policy import CachePolicy


@dataclass
class CacheArguments:
    """Base of every config class that has a cache policy; TrlParser reads its fields."""

    # A training may have a range of these two, so a flag takes several values (`without_lists`).
    window: int | None = field(
        default=None, metadata={"help": "W, thought tokens kept, instead of budget.", "nargs": "+"}
    )
    budget: int | None = field(default=None, metadata={"help": "Prompt and thought tokens kept, instead of window."})
    evict_ratio: float = field(
        default=0.25, metadata={"help": "Share of a full window that leaves at once.", "nargs": "+"}
    )

    def without_lists(self) -> None:
        """Makes a list of one, as a flag gives it, the value in it."""
        for key in ("window", "evict_ratio"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) == 1:
                setattr(self, key, value[0])

    @property
    def cache_policy(self) -> CachePolicy:
        """The keys as one object.

        Raises:
            ValueError: as `CachePolicy`.
        """
        return CachePolicy(self.window, self.budget, self.evict_ratio)
