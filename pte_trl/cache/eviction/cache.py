"""The cache of the eviction strategies: what is kept differs from layer to layer and from kv head to kv head.

A layer stores every thought token that is alive in at least one of its heads, once, with a mask that says in which.
A token dead in all of them is taken out, row by row; rows are padded to the longest with dead places. So the memory
held lies between the capacity and, where heads agree on nothing, the number of heads times it.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.cache.eviction.strategy import Strategy
from pte_trl.cache.masks import is_mixed
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import layer_types
from pte_trl.transfer import uploaded


class SelectiveLayer(BoundedLayer):
    """One layer: keys and values (batch, kv heads, prompt + kept, head_dim), prompt first, then in the text's order.

    Attributes:
        alive: (batch, kv heads, kept), whether the head still has this token.
        thought: (batch, kept), which thought token it is, counted from 0; of no meaning at a dead place.
        past: attention that the entries have received, as the strategy remembers it; None if it does not.
        padding: (batch, 1, prompt), False where the prompt is padded; None without padding.
        steps: thought tokens that had been fed at every eviction so far.
        schedules: of every kv head, with the head's own capacity as window.
    """

    def __init__(self, strategy: Strategy, schedules: list[Schedule]):
        self.strategy, self.schedules = strategy, schedules
        super().__init__(schedules[0])

    def reset(self) -> None:
        super().reset()
        self.alive = self.thought = self.past = self.padding = None
        self.steps = []
        self.evicted_by_head = [0] * len(self.schedules)
        self.unreported = False

    def see_prompt(self, mask: Tensor | None) -> None:
        """The prompt's padding, from the mask (batch, 1, prompt, prompt) of its attention: its last token sees all."""
        self.padding = None if mask is None else mask[:, :, -1]

    def visible(self) -> Tensor:
        """(batch, kv heads, prompt + kept), what a query may attend to now."""
        prompt = self.alive.new_ones(1, 1, 1) if self.padding is None else self.padding
        return torch.cat([prompt.expand(*self.alive.shape[:2], self.prompt), self.alive], dim=2)

    def report(self, probs: Tensor) -> None:
        """Takes the attention (batch, kv heads, 1, prompt + kept) that the token fed last has given."""
        self.past = self.strategy.remember(self.past, probs[..., self.prompt :])
        self.unreported = False

    def make_room(self, length: int, encode: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Evicts what has to leave before the next token is fed; does nothing when called again.

        Args:
            length: tokens fed next, 1.
            encode: called once with keys and values (batch, kv heads, m, head_dim) of the tokens that leave some
                head now: 0 in the heads they do not leave, and in rows with fewer than m of them.

        Raises:
            ValueError: more than one token.
            RuntimeError: the attention of the token before did not ask this cache what is alive.
        """
        if self.in_prompt():
            return
        if length != 1:
            raise ValueError(f"{length} thought tokens fed at once: an eviction strategy takes them one by one")
        if self.unreported:
            raise RuntimeError(
                "the model's attention does not know this cache, so it saw evicted entries: decode inside "
                "`with attention_for(model, cache) as extra:` and call model(..., **extra)"
            )
        due = [s.evictions_before(self.fed) - n for s, n in zip(self.schedules, self.evicted_by_head, strict=True)]
        if not any(due):
            return
        leaving = self._choose([s.evict * n for s, n in zip(self.schedules, due, strict=True)])
        if encode is not None:
            self._encode(leaving, encode)
        self._drop(leaving)
        self.evicted_by_head = [n + more for n, more in zip(self.evicted_by_head, due, strict=True)]
        self.steps.append(self.fed)
        self.evicted += 1

    def _choose(self, counts: list[int]) -> Tensor:
        """(batch, kv heads, kept), True for the `counts` entries that leave each head."""
        device = self.alive.device
        capacity = uploaded([s.window for s in self.schedules], device).unsqueeze(1)
        age = (self.fed - 1 - self.thought).unsqueeze(1)
        scores, protected = self.strategy.order(self.past, self.alive, age, capacity)
        # Two stable sorts: by score, the oldest first among equals; then unprotected, protected, dead.
        order = scores.argsort(dim=-1, stable=True)
        group = protected.long().masked_fill(~self.alive, 2)
        order = order.gather(2, group.gather(2, order).argsort(dim=-1, stable=True))
        return order.argsort(dim=-1) < uploaded(counts, device).unsqueeze(1)

    def _encode(self, leaving: Tensor, encode: Callable[[Tensor, Tensor], None]) -> None:
        places = places_of(leaving.any(1))
        now = leaving.gather(2, places.unsqueeze(1).expand(-1, leaving.shape[1], -1))
        encode(*(self._pick(x, places).masked_fill(~now.unsqueeze(-1), 0) for x in (self.keys, self.values)))

    def _drop(self, leaving: Tensor) -> None:
        """Entries die; tokens that no head has any more are taken out."""
        self.alive = self.alive & ~leaving
        places = places_of(self.alive.any(1))
        self.keys, self.values = (
            torch.cat([x[:, :, : self.prompt], self._pick(x, places)], dim=2) for x in (self.keys, self.values)
        )
        heads = places.unsqueeze(1).expand(-1, self.alive.shape[1], -1)
        self.alive = self.alive.gather(2, heads)
        self.thought = self.thought.gather(1, places)
        if self.past is not None:
            self.past = self.past.gather(3, heads.unsqueeze(2).expand(-1, -1, self.past.shape[2], -1))

    def _pick(self, x: Tensor, places: Tensor) -> Tensor:
        """Keys or values of thoughts at `places` (batch, m) -> (batch, kv heads, m, head_dim)."""
        index = (self.prompt + places)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = key_states.shape
        if self.alive is None:
            self.alive = torch.ones(batch, heads, 0, dtype=torch.bool, device=key_states.device)
            self.thought = torch.zeros(batch, 0, dtype=torch.long, device=key_states.device)
            return super().update(key_states, value_states)
        self.make_room(length)
        self.thought = torch.cat([self.thought, self.thought.new_full((batch, 1), self.fed)], dim=1)
        self.alive = torch.cat([self.alive, self.alive.new_ones(batch, heads, 1)], dim=2)
        if self.past is not None:
            self.past = pad(self.past, (0, 1))
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.fed, self.unreported = self.fed + 1, True
        return self.keys, self.values

    def kept(self) -> int:
        """Places held now: prompt, and thought tokens alive in some head of some row."""
        return 0 if self.keys is None else self.keys.shape[2]

    def _map(self, rows: Callable[[Tensor], Tensor]) -> None:
        super()._map(rows)
        for name in ("alive", "thought", "past", "padding"):
            if getattr(self, name) is not None:
                setattr(self, name, rows(getattr(self, name)))


def places_of(mask: Tensor) -> Tensor:
    """Where `mask` (batch, n) is True, in order: (batch, m), m the most of any row.

    A row with fewer is filled up with places where the mask is False.
    """
    return (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]


def check_full_attention(config) -> None:
    """Refuses a model for the eviction strategies, whose attention and masks are those of full layers.

    Raises:
        ValueError: a layer does not attend in full.
    """
    if is_mixed(config):
        others = ", ".join(sorted(set(layer_types(config)) - {"full_attention"}))
        raise ValueError(
            f"eviction: strategies take models whose layers all attend in full, this {config.model_type} has "
            f'{others}; allowed for it is eviction="sliding_window"'
        )


class SelectiveCache(BoundedCache):
    """A bounded cache whose evictions a `Strategy` decides; to be used inside `attention_for(model, cache)`.

    One object serves one batch; `reset()` makes it ready for another.

    Args:
        config: the model's configuration, for its layers and kv heads.
        strategy: which entries leave, and how many each head may keep. Prepared for the model already.
        schedule: its W is the mean number of thought entries per (layer, kv head).
        longest: thought tokens fed at most, if known (`Strategy.capacities`).

    Raises:
        ValueError: a layer does not attend in full.
    """

    def __init__(self, config, strategy: Strategy, schedule: Schedule, longest: int | None = None):
        check_full_attention(config)
        super().__init__(schedule.window, schedule.evict_ratio)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        self.capacities = strategy.capacities(layers, heads, schedule.window, longest)
        # A head evicts by a schedule of its own: its capacity may differ from W.
        self.layers = [SelectiveLayer(strategy, [replace(schedule, window=c) for c in row]) for row in self.capacities]

    def expect_prompt(self, tokens: int | None) -> None:
        if tokens is not None:
            raise ValueError(f"expect_prompt({tokens}): an eviction strategy takes the prompt in one forward")

    def room(self, fed: int) -> int:
        return 1

    @property
    def evictions(self) -> int:
        """Evictions so far in the layer that had most; one that takes entries from several heads counts once."""
        return max(layer.evicted for layer in self.layers)

    def evictions_after(self, fed: int) -> int:
        """The same, when `fed` thought tokens had been fed."""
        return max(bisect_left(layer.steps, fed) for layer in self.layers)

    def entries(self) -> Tensor:
        """(batch,) thought entries held now, over all layers and kv heads; at most layers * kv heads * W."""
        return sum(layer.alive.sum(dim=(1, 2)) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds for its whole batch, masks and remembered attention included."""
        extra = (x for layer in self.layers for x in (layer.alive, layer.thought, layer.past))
        return super().nbytes + sum(x.numel() * x.element_size() for x in extra if x is not None)
