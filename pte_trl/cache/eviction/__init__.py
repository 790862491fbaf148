"""Eviction strategies at inference (figure 4b of the paper): which thoughts leave a full cache.

PTE encodes whatever leaves, under every strategy. A new strategy is one file with a `Strategy` and one line in
STRATEGIES, which every generic test walks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.eviction.attention import NAME, attention_implementation
from pte_trl.cache.eviction.cache import SelectiveCache, check_full_attention
from pte_trl.cache.eviction.h2o import H2O
from pte_trl.cache.eviction.headkv import HeadKV
from pte_trl.cache.eviction.importance import load_importance, measure_importance, save_importance
from pte_trl.cache.eviction.pyramidkv import PyramidKV
from pte_trl.cache.eviction.sliding_window import SlidingWindow
from pte_trl.cache.eviction.strategy import Strategy
from pte_trl.cache.masks import config_of
from pte_trl.cache.schedule import Schedule

STRATEGIES: dict[str, type[Strategy]] = {
    "sliding_window": SlidingWindow,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "headkv": HeadKV,
}


def check_eviction(eviction: str | Strategy) -> None:
    """Refuses what is neither a strategy nor the name of one.

    Raises:
        ValueError: naming it and what is allowed.
    """
    known = eviction in STRATEGIES if isinstance(eviction, str) else isinstance(eviction, Strategy)
    if not known:
        raise ValueError(f"eviction={eviction!r}: allowed are {', '.join(map(repr, STRATEGIES))}, or a Strategy")


def make_cache(
    model: nn.Module, schedule: Schedule, eviction: str | Strategy = "sliding_window", longest: int | None = None
) -> BoundedCache:
    """The cache that a decode of `model`, in eval mode, fills.

    Args:
        schedule: its W is the mean number of thought entries kept over layers and kv heads.
        eviction: a key of STRATEGIES, or a strategy with its own settings. The name "sliding_window" is the plain
            `BoundedCache`; everything else is a `SelectiveCache`.
        longest: thought tokens fed at most, if known.

    Raises:
        ValueError: no strategy has this name, or it cannot serve the model's layers.
    """
    check_eviction(eviction)
    if eviction == "sliding_window":
        return BoundedCache.from_schedule(schedule, config_of(model))
    strategy = eviction if isinstance(eviction, Strategy) else STRATEGIES[eviction]()
    check_full_attention(config_of(model))
    strategy.prepare(model)
    return SelectiveCache(model.config, strategy, schedule, longest)


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
    "check_eviction",
    "load_importance",
    "make_cache",
    "measure_importance",
    "save_importance",
]
