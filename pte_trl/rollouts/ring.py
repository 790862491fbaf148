"""The bounded cache of the rollout engine: buffers made once, in which the window is a ring.

A row holds one sequence: `prompt` places, filled from the right, then `ring` places, where thought token i lies at
i mod ring. An eviction only clears places in the mask `seen`; the tokens that come next are written there. Nothing
is moved, and no shape changes from the first token to the last. Rows are independent: each is as far as it is.

Where `BoundedCache` keeps its entries in order, this one does not: attention adds up over a set, so that the order
matters to rounding alone. The engine says where the next token goes and when a row evicts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pte_trl.cache.bounded import BoundedCache, BoundedLayer

ALIGN = 16  # places are a multiple of it: attention kernels want an aligned mask


def aligned(places: int) -> int:
    return -(-places // ALIGN) * ALIGN


def ring_size(window: int, max_new_tokens: int) -> int:
    """Places of the ring: W, or fewer where no completion gets that long (nothing is ever evicted then)."""
    return min(window, max_new_tokens)


class RingLayer(BoundedLayer):
    """One layer. `buffers` are keys and values, (rows, kv heads, places, head_dim); `memories` (rows, n_g, r)."""

    def reset(self) -> None:
        super().reset()
        self.memories = self.first_memory = None

    def make_room(self, length: int, encode: Callable | None = None) -> None:
        """Nothing: the engine evicts between steps (`RingCache.evict`)."""

    def begin(self, source: BoundedLayer, rows: int, places: int) -> None:
        """Takes the encoder's side from `source`, a batch's first prompt; makes the buffers if there are none."""
        if self.buffers is None:
            # Zeros: a place that is not seen yet must not hold a NaN, which a masked softmax would still multiply.
            # Each in its own dtype: autocast leaves keys in float32 (after rotary) and values in bfloat16.
            self.buffers = tuple(
                states.new_zeros(rows, states.shape[1], places, states.shape[3])
                for states in (source.keys, source.values)
            )
            self.lazy_initialization(*self.buffers)
            if source.memory is not None:
                self.memories = source.memory.new_zeros(rows, *source.memory.shape)
                self.queries = torch.empty_like(source.queries)
        self.owner, self.first_memory = source.owner, source.memory
        if source.memory is not None:
            self.queries.copy_(source.queries)  # in place: a captured eviction reads it there

    def tensors(self) -> list[Tensor]:
        """What it holds for every row."""
        return [*self.buffers, *([] if self.memories is None else [self.memories])]

    def aim(self, rows: Tensor, place: Tensor, limit: int) -> None:
        """The next token of `rows`, which are the first ones, goes to `place`; attention sees `limit` places."""
        self.rows, self.place, self.limit = rows, place, limit
        self.memory = None if self.memories is None else self.memories[: len(rows)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.place] = states[:, :, 0]
        return tuple(buffer[: len(self.rows), :, : self.limit] for buffer in self.buffers)


class RingCache(BoundedCache):
    """Keys, values, memories and the mask of the engine's rows.

    Args:
        window, evict_ratio: as for `BoundedCache`.
        rows: sequences that are decoded together at most.
        prompt: tokens of the longest prompt.
        ring: places for thoughts, see `ring_size`.

    Attributes:
        seen: (rows, places), whether the sequence attends to the place.
    """

    def __init__(self, window: int, evict_ratio: float, rows: int, prompt: int, ring: int, device):
        super().__init__(window, evict_ratio)
        self.layer_class_to_replicate = partial(RingLayer, self.schedule)
        self.rows, self.prompt, self.ring = rows, prompt, ring
        self.seen = torch.zeros(rows, aligned(prompt + ring), dtype=torch.bool, device=device)
        self.begun = False

    @property
    def places(self) -> int:
        return self.seen.shape[1]

    def place_of(self, thought: Tensor) -> Tensor:
        """Where thought tokens lie, any shape."""
        return self.prompt + thought % self.ring

    def load(self, rows: Tensor, source: BoundedCache, mask: Tensor) -> None:
        """Prompts that `source` has been filled with, one for each of `rows`; mask: (rows, length), padded left."""
        if not self.begun:
            for index, filled in enumerate(source.layers):
                self.layer(index).begin(filled, self.rows, self.places)
            self.begun = True
        begin = self.prompt - mask.shape[1]
        for layer, filled in zip(self.layers, source.layers, strict=True):
            for buffer, states in zip(layer.buffers, (filled.keys, filled.values), strict=True):
                buffer[rows, :, begin : self.prompt] = states
        self._start(rows)
        self.seen[rows, begin : self.prompt] = mask.bool()

    def copy_prompts(self, rows: Tensor, origins: Tensor) -> None:
        """Starts `rows` with the prompts that lie in the rows `origins`."""
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[rows, :, : self.prompt] = buffer[origins, :, : self.prompt]
        prompts = self.seen[origins, : self.prompt]
        self._start(rows)
        self.seen[rows, : self.prompt] = prompts

    def _start(self, rows: Tensor) -> None:
        self.seen[rows] = False
        for layer in self.layers:
            if layer.memories is not None:
                layer.memories[rows] = layer.first_memory

    def gather(self, rows: Tensor) -> None:
        """Moves `rows` to the front."""
        kept = len(rows)
        for buffer in (x for layer in self.layers for x in layer.tensors()):
            buffer[:kept] = buffer[rows]
        self.seen[:kept] = self.seen[rows]

    def evict(self, rows: Tensor, oldest: Tensor, encoders: dict[int, Callable]) -> None:
        """Drops E thoughts of each row, from thought `oldest` on, and encodes them.

        Args:
            rows: (m,); a row may stand there several times.
            oldest: (m,), the oldest thought token that each of them still has.
            encoders: of every layer that encodes, (keys, values, queries, memory) -> memory.
        """
        thoughts = oldest.unsqueeze(1) + torch.arange(self.schedule.evict, device=oldest.device)
        places = self.place_of(thoughts)
        for index, encode in encoders.items():
            layer = self.layers[index]
            keys, values = (buffer[rows.unsqueeze(1), :, places].transpose(1, 2) for buffer in layer.buffers)
            layer.memories[rows] = encode(keys, values, layer.queries, layer.memories[rows])
        self.seen[rows.unsqueeze(1), places] = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and memories of all rows."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())
