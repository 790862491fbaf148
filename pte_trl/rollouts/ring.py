"""The bounded cache of the rollout engine: buffers made once, in which every row has a ring for its window.

A row holds one sequence. In a layer of full attention that is its prompt of p tokens, then a ring of as many places as
its window has, where thought token i lies at i mod ring:

    place   0 .. p - 1       p .. p + ring - 1                  p + ring .. places - 1
    holds   prompt tokens    thought tokens, W of them at most  nothing

p and W differ from row to row; all rows have as many places as the longest of them needs. The W tokens that a sequence
keeps are consecutive, so no two of them share a place. An eviction only clears places in the mask `seen`; the tokens
that come next are written there. Nothing is moved, and no shape changes from the first token to the last, which CUDA
graphs need. Rows are independent: each has its own number of tokens and its own evictions. Layers of other types have
buffers of their own (`pte_trl.rollouts.ring_layers`), in which nothing is evicted.

Where `BoundedCache` keeps its entries in order, this one does not: keys carry their positions (they are kept after
rotary) and attention sums over a set, so the order affects rounding alone. The engine says where the next token goes
and when a row evicts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.masks import additive
from pte_trl.rollouts.ring_layers import ALIGN, RINGS, RingLayer, RingSliding, Sizes, Step, aligned

__all__ = ["ALIGN", "RingCache", "aligned", "ring_size"]


def ring_size(window: int, max_new_tokens: int) -> int:
    """Places of the ring: W, or fewer where no completion gets that long (nothing is ever evicted then)."""
    return min(window, max_new_tokens)


class RingCache(BoundedCache):
    """Keys, values, states, accumulators and the masks of the engine's rows.

    Args:
        rows: sequences that are decoded together at most.
        places: prompt and thought tokens that a row holds at most.
        evict: tokens that leave a row at once at most.
        tokens: prompt and thought tokens that a row ever has at most, evicted ones included; None: `places`.

    Attributes:
        seen: (rows, places), whether the sequence attends to the place, in layers of full attention.
        prompt, ring: (rows,), tokens of the prompt, and places for thoughts behind it (`ring_size`).
        begun: whether this batch's encoder tensors have been taken.
    """

    def __init__(self, rows: int, places: int, evict: int, device, tokens: int | None = None):
        # Every row has a schedule of its own, which the engine follows; the one here is never asked.
        super().__init__(window=places)
        self.layer_class_to_replicate = None  # layers are made when the first prompts come
        self.rows, self.evict_at_most = rows, evict
        self.sizes = Sizes(rows, aligned(places), tokens or places)
        self.seen = torch.zeros(rows, self.sizes.places, dtype=torch.bool, device=device)
        # Of the device: `seen[rows, places] = True` would copy the value from the host, which a capture forbids.
        self.shown, self.hidden = (make((), dtype=torch.bool, device=device) for make in (torch.ones, torch.zeros))
        self.prompt, self.ring = (torch.ones(rows, dtype=torch.long, device=device) for _ in range(2))
        self.numbers = torch.arange(self.places, device=device)
        self.begun = False

    @property
    def places(self) -> int:
        return self.sizes.places

    @property
    def mixed(self) -> bool:
        return any(type(layer) is not RingLayer for layer in self.layers)

    @property
    def sliding(self) -> RingSliding | None:
        """The first layer of sliding attention; all have the same size."""
        return next((layer for layer in self.layers if isinstance(layer, RingSliding)), None)

    def has_room(self, rows: int, places: int, evict: int, tokens: int) -> bool:
        """Whether so many rows with that much fit; arguments as for the cache itself."""
        sliding = self.sliding
        near = sliding is None or sliding.size >= min(sliding.sliding_window, tokens)
        return near and rows <= self.rows and evict <= self.evict_at_most and places <= self.places

    def place_of(self, rows: Tensor, thought: Tensor) -> Tensor:
        """Where thought tokens of rows lie; both arguments of the same shape, or one that broadcasts."""
        return self.prompt[rows] + thought % self.ring[rows]

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, source: BoundedCache) -> None:
        """Makes the layers, if there are none, and takes the encoders' tensors of a batch from its first prompts."""
        self.layers = self.layers or [RINGS[type(filled)](filled) for filled in source.layers]
        for layer, filled in zip(self.layers, source.layers, strict=True):
            layer.begin(filled, self.sizes)
        self.begun = True

    def load(self, rows: Tensor, source: BoundedCache, lengths: Tensor) -> None:
        """Writes the prompts, padded on the left, that `source` has been filled with into `rows`.

        Args:
            lengths: (len(rows),), tokens of each prompt.
        """
        if not self.begun:
            self.begin(source)
        for layer, filled in zip(self.layers, source.layers, strict=True):
            layer.load(rows, filled, lengths, source.get_seq_length())

    def copy_prompts(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        """Writes the prompts that lie in the rows `origins`, of `longest` tokens at most, into `rows`.

        Where decoding has begun in `origins`, `restore` has to follow.
        """
        for layer in self.layers:
            layer.copy(rows, origins, longest)

    def overwritten(self) -> list[Tensor]:
        """The buffers in which decoding writes over what the prompt has left; none where all layers attend in full."""
        return [buffer for layer in self.layers for buffer in layer.overwritten()]

    def saved(self, row: int) -> list[Tensor]:
        """A copy of what the prompt has left in `overwritten`, taken before the row decodes."""
        return [buffer[row].clone() for buffer in self.overwritten()]

    def restore(self, rows: Tensor, saved: Sequence[list[Tensor]]) -> None:
        """Writes what `saved` has returned for each of `rows`."""
        for buffer, parts in zip(self.overwritten(), zip(*saved, strict=True), strict=True):
            buffer[rows] = torch.stack(parts)

    def start(self, rows: Tensor, prompts: Tensor, rings: Tensor) -> None:
        """Starts `rows`, whose prompts have been written, and forgets their thoughts, which the mask hides.

        Args:
            prompts, rings: (len(rows),), tokens of each prompt, and places for thoughts behind it.
        """
        self.prompt[rows], self.ring[rows] = prompts, rings
        self.seen[rows] = self.numbers < prompts.unsqueeze(1)
        for layer in self.layers:
            layer.start(rows)

    def gather(self, rows: Tensor) -> None:
        """Makes `rows` the first ones, in this order."""
        kept = len(rows)
        for buffer in (*(x for layer in self.layers for x in layer.tensors()), self.seen, self.prompt, self.ring):
            buffer[:kept] = buffer[rows]

    # ---- steps: these run inside CUDA graphs, so nothing here may read a tensor on the host ------------------------

    def aim(self, rows: Tensor, position: Tensor, place: Tensor, limit: int) -> None:
        """Where the next token of `rows`, which are the first ones, goes.

        Args:
            position: (rows,), tokens before it, evicted ones included.
            place: (rows,), in the layers of full attention, which see the first `limit` places.
        """
        near = None if self.sliding is None else position % self.sliding.size
        for layer in self.layers:
            layer.aim(Step(rows, place, limit, near))

    def mask(self, position: Tensor, limit: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor | None]:
        """What the tokens at `position` of the first rows see, as the model takes it.

        Args:
            position, limit: as for `aim`.

        Returns:
            (rows, 1, 1, places), 0 or -inf; where layers are mixed, one by the type of the layer.
        """
        full = additive(self.seen[: len(position), None, None, :limit], dtype)
        if not self.mixed:
            return full
        # Names as in `pte_trl.cache.masks.masks_by_type`. A token of a decode is no padding: states need no mask.
        masks = {"full_attention": full, "hybrid": full} | dict.fromkeys(("linear_attention", "conv", "mlp", "moe"))
        if self.sliding is not None:
            size = self.sliding.size
            place = torch.arange(size, device=position.device)
            # The ring holds the last tokens, as many as it has places, and a chunk begins at its first place.
            lasts = position, position % size
            near, chunk = (additive((place <= last.unsqueeze(1))[:, None, None], dtype) for last in lasts)
            masks |= {"sliding_attention": near, "hybrid_sliding": near, "chunked_attention": chunk}
        return masks

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
        """Bytes of keys, values, states and accumulators of all rows."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())
