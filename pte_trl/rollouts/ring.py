"""The bounded cache of the rollout engine: buffers made once, in which the window is a ring.

A row holds one sequence: `prompt` places, filled from the right, then `ring` places, where thought token i lies at
i mod ring:

    place   0 .. prompt - 1            prompt .. prompt + ring - 1
    holds   (padding) prompt tokens    thought tokens, W of them at most

The W tokens that a sequence keeps are consecutive, so no two of them share a place. An eviction only clears places in
the mask `seen`; the tokens that come next are written there. Nothing is moved, and no shape changes from the first
token to the last, which is what CUDA graphs need. Rows are independent: each has its own number of tokens.

Where `BoundedCache` keeps its entries in order, this one does not: keys carry their positions (they are kept after
rotary) and attention sums over a set, so the order affects rounding alone. The engine says where the next token goes
and when a row evicts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.cache.schedule import Schedule

ALIGN = 16  # places are a multiple of it: attention kernels want an aligned mask; the last ones may stay unused


def aligned(places: int) -> int:
    """`places`, rounded up to a multiple of ALIGN."""
    return -(-places // ALIGN) * ALIGN


def ring_size(window: int, max_new_tokens: int) -> int:
    """Places of the ring: W, or fewer where no completion gets that long (nothing is ever evicted then)."""
    return min(window, max_new_tokens)


class RingLayer(BoundedLayer):
    """One layer. `buffers` are keys and values, (rows, kv heads, places, head_dim); `accumulators` (rows, n_g, r)."""

    def reset(self) -> None:
        super().reset()
        self.accumulators = self.first_accumulator = None

    def make_room(self, length: int, encode: Callable | None = None) -> None:
        """Does nothing: the engine evicts between steps (`RingCache.evict`), since rows are due at different times."""

    def begin(self, source: BoundedLayer, rows: int, places: int) -> None:
        """Takes the encoder's tensors from `source`, a batch's first prompt; makes the buffers if there are none.

        The weights may have changed since the batch before, so the encoder's tensors are taken anew each time.
        """
        if self.buffers is None:
            # Zeros: a place that is not seen yet must not hold a NaN, which a masked softmax would still multiply.
            # Each in its own dtype: autocast leaves keys in float32 (after rotary) and values in bfloat16.
            self.buffers = tuple(
                states.new_zeros(rows, states.shape[1], places, states.shape[3])
                for states in (source.keys, source.values)
            )
            self.lazy_initialization(*self.buffers)
            if source.accumulator is not None:
                self.accumulators = source.accumulator.new_zeros(rows, *source.accumulator.shape)
                self.queries = torch.empty_like(source.queries)
        self.owner, self.first_accumulator = source.owner, source.accumulator
        if source.accumulator is not None:
            self.queries.copy_(source.queries)  # in place: the graph of an eviction reads it there

    def tensors(self) -> list[Tensor]:
        """What it holds for every row."""
        return [*self.buffers, *([] if self.accumulators is None else [self.accumulators])]

    def aim(self, rows: Tensor, place: Tensor, limit: int) -> None:
        """The next token of `rows`, which are the first ones, goes to `place`; attention sees `limit` places."""
        self.rows, self.place, self.limit = rows, place, limit
        self.accumulator = (
            None if self.accumulators is None else self.accumulators[: len(rows)]
        )  # what the PTE layer reads

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.place] = states[:, :, 0]
        # All places, seen or not: the mask leaves out those that are empty or evicted.
        return tuple(buffer[: len(self.rows), :, : self.limit] for buffer in self.buffers)


class RingCache(BoundedCache):
    """Keys, values, accumulators and the mask of the engine's rows.

    Args:
        schedule: when which thought token leaves.
        rows: sequences that are decoded together at most.
        prompt: tokens of the longest prompt.
        ring: places for thoughts, see `ring_size`.

    Attributes:
        seen: (rows, places), whether the sequence attends to the place.
        begun: whether this batch's encoder tensors have been taken.
    """

    def __init__(self, schedule: Schedule, rows: int, prompt: int, ring: int, device):
        super().__init__(schedule.window, schedule.evict_ratio)
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
        """Starts `rows` with the prompts that `source` has been filled with; mask: (rows, length), padded left."""
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
        prompts = self.seen[origins, : self.prompt]  # before `_start`: a row may be both origin and target
        self._start(rows)
        self.seen[rows, : self.prompt] = prompts

    def _start(self, rows: Tensor) -> None:
        """Forgets what the rows held. Keys and values stay where they are, hidden by the mask."""
        self.seen[rows] = False
        for layer in self.layers:
            if layer.accumulators is not None:
                layer.accumulators[rows] = layer.first_accumulator

    def gather(self, rows: Tensor) -> None:
        """Makes `rows` the first ones, in this order."""
        kept = len(rows)
        for buffer in (x for layer in self.layers for x in layer.tensors()):
            buffer[:kept] = buffer[rows]
        self.seen[:kept] = self.seen[rows]

    def evict(self, rows: Tensor, oldest: Tensor, encoders: dict[int, Callable]) -> None:
        """Drops E thoughts of each row, from thought `oldest` on, and encodes them.

        Args:
            rows: (m,); a row may stand there several times.
            oldest: (m,), the oldest thought token that each of them still has.
            encoders: of every layer that encodes, (keys, values, queries, accumulator) -> accumulator.
        """
        # Indexed by numbers, never by booleans: the sizes are then known without a read from the device.
        thoughts = oldest.unsqueeze(1) + torch.arange(self.schedule.evict, device=oldest.device)
        places = self.place_of(thoughts)
        for index, encode in encoders.items():
            layer = self.layers[index]
            keys, values = (buffer[rows.unsqueeze(1), :, places].transpose(1, 2) for buffer in layer.buffers)
            layer.accumulators[rows] = encode(keys, values, layer.queries, layer.accumulators[rows])
        self.seen[rows.unsqueeze(1), places] = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and accumulators of all rows."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())
