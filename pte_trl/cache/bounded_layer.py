"""A layer of full attention under the bounded cache: the prompt, a window of thought tokens, and the state S.

Keys are kept as they come, after rotary, at their absolute positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CacheLayerMixin

from pte_trl.cache.schedule import Schedule


class Rows(ABC):
    """The methods of a cache layer that choose, repeat or drop rows, by one that maps every tensor with a row each."""

    @abstractmethod
    def _map(self, rows: Callable[[Tensor], Tensor]) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"crop({tokens_to_remove}): a bounded cache cannot be cropped, evicted tokens do not come back"
            )


class BoundedLayer(Rows, CacheLayerMixin):
    """One layer: keys and values (batch, kv heads, prompt + kept thought, head_dim), prompt first.

    Without gradients they are views of buffers that are written in place: take a copy of what is to be kept.

    Attributes:
        prompt, fed, evicted: prompt tokens, thought tokens and evictions so far.
        expected: prompt tokens there will be; None if the first forward brings them all.
        accumulator: what the encoder keeps of evicted tokens: (n_g, r) before the first eviction, then
            (batch, n_g, r); None without a PTE adapter.
        queries: W_Q^a q_g, (n_g, r), computed once at the prompt.
        owner: name of the adapter whose accumulator this is.
        history: (batch, 32), of the first layer only: a hash of the first `known` tokens of every row, by which
            `generate` knows a sequence again (`pte_trl.cache.generate`).
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, schedule: Schedule, expected: int | None = None):
        CacheLayerMixin.__init__(self)  # not super(): in a hybrid layer, that would be the recurrent part
        self.schedule = schedule
        self.reset()
        self.expected = expected

    def reset(self) -> None:
        self.keys = self.values = None
        self.buffers = None  # what `keys` and `values` are views of, once tokens are fed without gradients
        self.accumulator = self.queries = self.owner = self.expected = self.history = None
        self.prompt = self.fed = self.evicted = self.known = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def in_prompt(self) -> bool:
        """Whether the next token belongs to the prompt."""
        return self.prompt == 0 if self.expected is None else self.prompt < self.expected

    def make_room(self, length: int, encode: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Evicts what has to leave before `length` thought tokens are fed; does nothing when called again.

        Args:
            length: tokens fed next.
            encode: called with the keys and values, (batch, kv heads, E, head_dim), before they are dropped.

        Raises:
            ValueError: an eviction would fall between two of the tokens.
        """
        self._settle()
        if self.in_prompt():
            return
        if length > self.schedule.room(self.fed):
            raise ValueError(
                f"{length} tokens fed at once after {self.fed} thought tokens: an eviction falls between them; at "
                f"most {self.schedule.room(self.fed)} fit (window={self.schedule.window}). To continue this sequence, "
                "feed them with pte_trl.cache.feed; for another sequence, call cache.reset() first"
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
        self.make_room(length)
        if self.in_prompt():
            return self._fill(key_states, value_states)
        if torch.is_grad_enabled():  # what is saved for backward must not be written over
            self.buffers = None
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        else:
            self._append(key_states, value_states)
        self.fed += length
        return self.keys, self.values

    def _fill(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes prompt tokens."""
        if self.expected is not None and self.prompt + keys.shape[2] > self.expected:
            raise ValueError(
                f"{keys.shape[2]} tokens fed at once after {self.prompt} of the {self.expected} prompt tokens "
                f"to come: the prompt ends between them; feed them with pte_trl.cache.feed"
            )
        if self.prompt:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.prompt = keys, values, keys.shape[2]
        return keys, values

    def _settle(self) -> None:
        """Makes what is held usable in the autograd mode under way.

        Outside of inference mode, a tensor made in it can neither be written in place nor be saved for backward. And
        buffers of which `keys` is no view, after `offload` or unpickling, would bring back what has left.
        """
        if not torch.is_inference_mode_enabled():
            for name in ("keys", "values", "accumulator", "queries"):
                held = getattr(self, name)
                if held is not None and held.is_inference():
                    setattr(self, name, held.clone())
        if self.buffers is not None and self.buffers[0].data_ptr() != self.keys.data_ptr():
            self.buffers = None

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Writes after what is kept, into buffers made once: a new tensor per token would copy the whole cache."""
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
        """Keys or values without the entries from `start` to `stop`; in the buffer, later ones move up."""
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
            if self.accumulator is not None and self.accumulator.dim() == 3:
                self.accumulator = rows(self.accumulator)
            if self.history is not None:
                self.history = rows(self.history)
