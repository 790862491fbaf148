"""What is kept of a sequence, and what is evicted when: schedule, bounded cache, masks, eviction strategies."""

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.generate import feed  # also teaches `generate` the bounded cache
from pte_trl.cache.policy import CachePolicy

__all__ = ["BoundedCache", "CachePolicy", "feed"]
