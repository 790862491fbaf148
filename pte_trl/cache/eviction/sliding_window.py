"""The sliding window, the cache policy that the method is trained under."""

from dataclasses import dataclass

from pte_trl.cache.eviction.strategy import Strategy


@dataclass
class SlidingWindow(Strategy):
    """The oldest thought tokens leave, the same in every layer and head.

    Source: arXiv 2602.16839, eq. 2 (cache policy D). It has no knobs.

    The name "sliding_window" gives the faster `BoundedCache`, which does the same; an instance of this class uses
    the general `SelectiveCache`, so that tests can compare the two.
    """
