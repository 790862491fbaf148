"""The decode view: a transformers `Cache` that keeps the prompt, a window of thought tokens, and the state S.

What decoding changes lives here and nowhere else: keys, values, the encoder's memory, the counts. Modules stay pure.
The first call of a forward fills the prompt; every later one feeds thought tokens, one by one or in chunks that no
eviction interrupts (`Schedule.chunks`). Keys are kept as they come, after rotary, at their absolute positions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pte_trl.schedule import Schedule


class BoundedLayer(CacheLayerMixin):
    """One layer: keys and values (batch, kv heads, prompt + kept thought, head_dim), prompt first.

    Without gradients they are views of buffers that are written in place: take a copy of what is to be kept.

    Attributes:
        memory: what the encoder keeps of evicted tokens, (n_g, r) before the first eviction, then (batch, n_g, r);
            None without a PTE adapter.
        queries: W_Q^a q_g, (n_g, r), computed once at the prompt.
        owner: name of the adapter whose memory this is.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.buffers = None  # what `keys` and `values` are views of, once tokens are fed without gradients
        self.memory = self.queries = self.owner = None
        self.prompt = self.fed = self.evicted = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def make_room(self, length: int, encode: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Evicts what has to leave before `length` thought tokens are fed; does nothing when called again.

        Args:
            length: tokens fed next.
            encode: called with the keys and values, (batch, kv heads, E, head_dim), before they are dropped.

        Raises:
            ValueError: an eviction would fall between two of the tokens.
        """
        if not self.is_initialized:
            return
        if length > self.schedule.room(self.fed):
            raise ValueError(
                f"{length} tokens fed at once after {self.fed} thought tokens: an eviction falls between them; at "
                f"most {self.schedule.room(self.fed)} fit (window={self.schedule.window}, see Schedule.chunks)"
            )
        while self.evicted < self.schedule.evictions_before(self.fed):
            start, stop = self.prompt, self.prompt + self.schedule.evict
            if encode is not None:
                encode(self.keys[:, :, start:stop], self.values[:, :, start:stop])
            self.keys, self.values = (self._without(x, start, stop) for x in (self.keys, self.values))
            self.evicted += 1

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        length = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.prompt = key_states, value_states, length
            return self.keys, self.values
        self.make_room(length)
        if torch.is_grad_enabled():  # what is saved for backward must not be written over
            self.buffers = None
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        else:
            self._append(key_states, value_states)
        self.fed += length
        return self.keys, self.values

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Writes behind what is kept, into buffers made once: a new tensor per token would copy the whole cache."""
        held, needed = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < needed:
            size = min(self.prompt + self.schedule.window, 2 * needed)  # a window may be set far too large
            self.buffers = tuple(x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (self.keys, self.values))
            for buffer, x in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer[:, :, :held] = x
        for buffer, x in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, held:needed] = x
        self.keys, self.values = (buffer[:, :, :needed] for buffer in self.buffers)

    def _without(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Keys or values without the entries from `start` to `stop`; in the buffer, those behind move up."""
        if self.buffers is None or torch.is_grad_enabled():
            return torch.cat([x[:, :, :start], x[:, :, stop:]], dim=2)
        left = x.shape[2] - (stop - start)
        x[:, :, start:left] = x[:, :, stop:].clone()
        return x[:, :, :left]

    def kept(self) -> int:
        """Prompt and thought tokens that the next token will find here, after the eviction due before it."""
        return self.prompt + self.fed - self.schedule.first_visible(self.fed)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: positions are absolute and keep growing."""
        return self.prompt + self.fed

    def get_max_length(self) -> int:
        return -1

    def _map(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values, self.buffers = rows(self.keys), rows(self.values), None
            if self.memory is not None and self.memory.dim() == 3:
                self.memory = rows(self.memory)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a bounded cache cannot be cropped: evicted tokens do not come back")


class BoundedCache(Cache):
    """Cache policy D of eq. 2 for `model.generate(..., past_key_values=BoundedCache(window=...))`.

    Works for a bare model, a LoRA model (nothing is learnt from the evicted) and a PTE model (they are encoded).
    One object serves one batch; `reset()` makes it ready for another.

    Args:
        window: W, thought tokens kept.
        evict_ratio: share of the window that leaves when it is full.
    """

    def __init__(self, window: int, evict_ratio: float = 0.25):
        self.schedule = Schedule(window, evict_ratio)
        # Not a lambda over `self`: a cycle would keep the whole cache until the garbage collector comes round.
        super().__init__(layer_class_to_replicate=partial(BoundedLayer, self.schedule))

    def layer(self, layer_idx: int) -> BoundedLayer:
        """The layer's part, made if it is not there yet."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer_idx]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        # The mask is built over what is kept, so the first query stands right behind it.
        return self.layer(layer_idx).kept()

    @property
    def evictions(self) -> int:
        """Evictions so far."""
        return self.layers[0].evicted if self.layers else 0

    def evictions_after(self, fed: int) -> int:
        """Evictions when `fed` thought tokens have been fed."""
        return self.schedule.evictions(fed)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds for its whole batch, the encoder's memory included."""
        held = (x for layer in self.layers for x in (*(layer.buffers or (layer.keys, layer.values)), layer.memory))
        return sum(x.numel() * x.element_size() for x in held if x is not None)
