"""Eviction strategies at inference (figure 4b of the paper): which thoughts leave a full cache.

Whatever leaves is encoded by PTE as ever. A new strategy is one file with a `Strategy` and one line in STRATEGIES,
which every generic test walks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.eviction.attention import NAME, attention_implementation
from pte_trl.cache.eviction.cache import SelectiveCache
from pte_trl.cache.eviction.h2o import H2O
from pte_trl.cache.eviction.headkv import HeadKV
from pte_trl.cache.eviction.importance import load_importance, measure_importance, save_importance
from pte_trl.cache.eviction.pyramidkv import PyramidKV
from pte_trl.cache.eviction.sliding_window import SlidingWindow
from pte_trl.cache.eviction.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "sliding_window": SlidingWindow,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "headkv": HeadKV,
}


def make_cache(
    model: nn.Module, eviction: str | Strategy, window: int, evict_ratio: float = 0.25, longest: int | None = None
) -> BoundedCache:
    """The cache that a decode of `model`, in eval mode, fills.

    Args:
        eviction: a key of STRATEGIES, or a strategy with knobs of its own. The name "sliding_window" is the plain
            `BoundedCache`; everything else is a `SelectiveCache`.
        window: W, thought entries kept, the mean over layers and kv heads.
        evict_ratio: share of what is full that leaves at once.
        longest: thought tokens fed at most, if known.

    Raises:
        ValueError: no strategy has this name.
    """
    if eviction == "sliding_window":
        return BoundedCache(window, evict_ratio)
    if not isinstance(eviction, Strategy):
        if eviction not in STRATEGIES:
            raise ValueError(f"eviction={eviction!r}: allowed are {', '.join(map(repr, STRATEGIES))}, or a Strategy")
        eviction = STRATEGIES[eviction]()
    eviction.prepare(model)
    return SelectiveCache(model.config, eviction, window, evict_ratio, longest)


@contextmanager
def attention_for(model: nn.Module, cache: BoundedCache) -> Iterator[dict]:
    """What a decode with this cache needs: keyword arguments for every `model(...)` call inside.

    Nothing for the plain bounded cache; the selective attention, and the cache for it, for a `SelectiveCache`.
    """
    if isinstance(cache, SelectiveCache):
        with attention_implementation(model, NAME):
            yield {"selective": cache}
    else:
        yield {}


__all__ = [
    "H2O",
    "STRATEGIES",
    "HeadKV",
    "PyramidKV",
    "SelectiveCache",
    "SlidingWindow",
    "Strategy",
    "attention_for",
    "load_importance",
    "make_cache",
    "measure_importance",
    "save_importance",
]
