"""The bounded cache of the rollout engine: buffers made once, in which every row has a ring for its window.

A row holds one sequence: its prompt of p tokens, then a ring of as many places as its window has, where thought token
i lies at i mod ring:

    place   0 .. p - 1       p .. p + ring - 1                  p + ring .. places - 1
    holds   prompt tokens    thought tokens, W of them at most  nothing

p and W differ from row to row; all rows have as many places as the longest of them needs. The W tokens that a sequence
keeps are consecutive, so no two of them share a place. An eviction only clears places in the mask `seen`; the tokens
that come next are written there. Nothing is moved, and no shape changes from the first token to the last, which CUDA
graphs need. Rows are independent: each has its own number of tokens and its own evictions.

Where `BoundedCache` keeps its entries in order, this one does not: keys carry their positions (they are kept after
rotary) and attention sums over a set, so the order affects rounding alone. The engine says where the next token goes
and when a row evicts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pte_trl.cache.bounded import BoundedCache, BoundedLayer

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
        rows: sequences that are decoded together at most.
        places: prompt and thought tokens that a row holds at most.
        evict: tokens that leave a row at once at most.

    Attributes:
        seen: (rows, places), whether the sequence attends to the place.
        prompt, ring: (rows,), tokens of the prompt, and places for thoughts behind it (`ring_size`).
        begun: whether this batch's encoder tensors have been taken.
    """

    def __init__(self, rows: int, places: int, evict: int, device):
        # Every row has a schedule of its own, which the engine follows; the one here is never asked.
        super().__init__(window=places)
        self.layer_class_to_replicate = partial(RingLayer, self.schedule)
        self.rows, self.evict_at_most = rows, evict
        self.seen = torch.zeros(rows, aligned(places), dtype=torch.bool, device=device)
        # Of the device: `seen[rows, places] = True` would copy the value from the host, which a capture forbids.
        self.shown, self.hidden = (make((), dtype=torch.bool, device=device) for make in (torch.ones, torch.zeros))
        self.prompt, self.ring = (torch.ones(rows, dtype=torch.long, device=device) for _ in range(2))
        self.numbers = torch.arange(self.places, device=device)
        self.begun = False

    @property
    def places(self) -> int:
        return self.seen.shape[1]

    def place_of(self, rows: Tensor, thought: Tensor) -> Tensor:
        """Where thought tokens of rows lie; both arguments of the same shape, or one that broadcasts."""
        return self.prompt[rows] + thought % self.ring[rows]

    def load(self, rows: Tensor, source: BoundedCache, lengths: Tensor) -> None:
        """Writes the prompts, padded on the left, that `source` has been filled with into `rows`.

        Args:
            lengths: (len(rows),), tokens of each prompt.
        """
        if not self.begun:
            for index, filled in enumerate(source.layers):
                self.layer(index).begin(filled, self.rows, self.places)
            self.begun = True
        longest = source.get_seq_length()
        # Turned left by its padding, a prompt begins at place 0; the padding lies behind it, where nothing is seen.
        order = (self.numbers[:longest] + (longest - lengths).unsqueeze(1)) % longest
        for layer, filled in zip(self.layers, source.layers, strict=True):
            for buffer, states in zip(layer.buffers, (filled.keys, filled.values), strict=True):
                index = order[:, None, :, None].expand(-1, *states.shape[1:2], -1, states.shape[3])
                buffer[rows, :, :longest] = states.gather(2, index)

    def copy_prompts(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        """Writes the prompts that lie in the rows `origins`, of `longest` tokens at most, into `rows`."""
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[rows, :, :longest] = buffer[origins, :, :longest]

    def start(self, rows: Tensor, prompts: Tensor, rings: Tensor) -> None:
        """Starts `rows`, whose prompts have been written, and forgets their thoughts, which the mask hides.

        Args:
            prompts, rings: (len(rows),), tokens of each prompt, and places for thoughts behind it.
        """
        self.prompt[rows], self.ring[rows] = prompts, rings
        self.seen[rows] = self.numbers < prompts.unsqueeze(1)
        for layer in self.layers:
            if layer.accumulators is not None:
                layer.accumulators[rows] = layer.first_accumulator

    def gather(self, rows: Tensor) -> None:
        """Makes `rows` the first ones, in this order."""
        kept = len(rows)
        for buffer in (*(x for layer in self.layers for x in layer.tensors()), self.seen, self.prompt, self.ring):
            buffer[:kept] = buffer[rows]

    def evict(self, rows: Tensor, oldest: Tensor, counts: Tensor, encoders: dict[int, Callable]) -> None:
        """Drops thoughts of each row, `counts` of them from thought `oldest` on, and encodes them.

        Args:
            rows: (m,); a row may stand there several times.
            oldest: (m,), the oldest thought token that each of them still has.
            counts: (m,), from 1 to `evict_at_most`.
            encoders: of every layer that encodes, (keys, values, queries, accumulator) -> accumulator.
        """
        # Indexed by numbers, never by booleans: the sizes are then known without a read from the device. So every row
        # names `evict_at_most` places, its first one again where it evicts fewer, and zeros add nothing to S'.
        which = self.numbers[: self.evict_at_most]
        leaves = which < counts.unsqueeze(1)
        rows_of = rows.unsqueeze(1)
        places = self.place_of(rows_of, oldest.unsqueeze(1) + which * leaves)
        stays = ~leaves[:, None, :, None]
        for index, encode in encoders.items():
            layer = self.layers[index]
            keys, values = (b[rows_of, :, places].transpose(1, 2).masked_fill(stays, 0) for b in layer.buffers)
            layer.accumulators[rows] = encode(keys, values, layer.queries, layer.accumulators[rows])
        self.seen[rows_of, places] = self.hidden

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and accumulators of all rows."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())
