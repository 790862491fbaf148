"""What the engine's cache keeps of one layer, for all rows: buffers made once and written in place.

    full attention     a prompt, then a ring for the thoughts of a window; evictions clear places of the mask
    sliding attention  a ring of the last tokens, as many as the model's own window: token i lies at i mod its size
    recurrent          conv and recurrent states; their size does not depend on the tokens
    hybrid             a recurrent state beside either kind of attention

Full attention only adds to a prompt, so another row's prompt can be copied at any time. The other two write over it:
what a prompt has left there is copied before decoding begins (`RingPart.overwritten`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pte_trl.cache.bounded import BoundedLayer
from pte_trl.cache.layers import HybridLayer, RecurrentLayer, SlidingHybridLayer, SlidingLayer, held
from pte_trl.compat.transformers import LinearAttentionLayer

ALIGN = 16  # places are a multiple of it: attention kernels want an aligned mask; the last ones may stay unused


def aligned(places: int) -> int:
    """`places`, rounded up to a multiple of ALIGN."""
    return -(-places // ALIGN) * ALIGN


class Step(NamedTuple):
    """Where the next token of the first rows goes.

    Attributes:
        rows: (rows,), their numbers.
        place: (rows,), in the buffers of full attention, of which it sees the first `limit` places.
        near: (rows,), in the rings of sliding attention; None without any.
    """

    rows: Tensor
    place: Tensor
    limit: int
    near: Tensor | None


class Sizes(NamedTuple):
    """Of an engine's buffers: rows, places of full attention, and prompt and thought tokens that a row ever has."""

    rows: int
    places: int
    tokens: int


class RingPart:
    """What the engine asks of every layer; a hybrid layer calls both of its parts by `super()`."""

    def begin(self, source, sizes: Sizes) -> None:
        """Takes what follows from the weights from `source`, a batch's first prompts, and makes missing buffers."""

    def load(self, rows: Tensor, source, lengths: Tensor, longest: int) -> None:
        """Writes prompts, padded on the left to `longest` tokens, that `source` has been filled with into `rows`.

        Args:
            lengths: (len(rows),), tokens of each prompt.
        """

    def copy(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        """Writes the prompts of the rows `origins` into `rows`; what is `overwritten` as it is there now."""

    def start(self, rows: Tensor) -> None:
        """Forgets the thoughts of `rows`, whose prompts have been written."""

    def aim(self, step: Step) -> None:
        """Where the next tokens go."""

    def overwritten(self) -> list[Tensor]:
        """Those of `tensors` in which decoding writes over what the prompt has left."""
        return []

    def tensors(self) -> list[Tensor]:
        """What is held for every row, (rows, ...)."""
        return []


def columns(lengths: Tensor, kept: int, size: int, count: int) -> Tensor:
    """Which column of prompts padded on the left goes to which place of a ring: the latest token that belongs there.

    Args:
        lengths: (rows,), tokens of each prompt.
        kept: columns that there are, the last ones.
        size: of the ring.

    Returns:
        (rows, count), for the first `count` places. Where no token belongs, or none that is kept, any column: such a
        place is not seen before it is written.
    """
    last = lengths.unsqueeze(1) - 1
    token = last - (last - torch.arange(count, device=lengths.device)) % size
    return (token + kept - 1 - last).clamp(0, kept - 1)


def turned(states: Tensor, index: Tensor) -> Tensor:
    """(rows, heads, columns, width) -> (rows, heads, places, width), by `columns`."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def buffer_for(states: Tensor, rows: int, places: int) -> Tensor:
    """A buffer of zeros: a place that is not seen yet must not hold a NaN, which a masked softmax would multiply."""
    return states.new_zeros(rows, states.shape[1], places, states.shape[3])


class RingLayer(RingPart, BoundedLayer):
    """Full attention. `buffers`: keys and values, (rows, kv heads, places, width); `accumulators`: (rows, n_g, r)."""

    def __init__(self, source: BoundedLayer):
        BoundedLayer.__init__(self, source.schedule)  # never asked: every row has a schedule of its own

    def reset(self) -> None:
        BoundedLayer.reset(self)
        self.accumulators = self.first_accumulator = None

    def make_room(self, length: int, encode: Callable | None = None) -> None:
        """Does nothing: the engine evicts between steps (`RingCache.evict`), since rows are due at different times."""

    def begin(self, source: BoundedLayer, sizes: Sizes) -> None:
        """The weights may have changed since the batch before, so the encoder's tensors are taken anew each time."""
        super().begin(source, sizes)
        if self.buffers is None:
            # Each in its own dtype and width: autocast leaves keys in float32 (after rotary) and values in bfloat16.
            self.buffers = tuple(buffer_for(x, sizes.rows, sizes.places) for x in (source.keys, source.values))
            self.lazy_initialization(*self.buffers)
            if source.accumulator is not None:
                self.accumulators = source.accumulator.new_zeros(sizes.rows, *source.accumulator.shape)
                self.queries = torch.empty_like(source.queries)
        self.owner, self.first_accumulator = source.owner, source.accumulator
        if source.accumulator is not None:
            self.queries.copy_(source.queries)  # in place: the graph of an eviction reads it there

    def load(self, rows: Tensor, source: BoundedLayer, lengths: Tensor, longest: int) -> None:
        super().load(rows, source, lengths, longest)
        # The prompt begins at place 0; the padding lies behind it, where nothing is seen.
        index = columns(lengths, longest, longest, longest)
        for buffer, states in zip(self.buffers, (source.keys, source.values), strict=True):
            buffer[rows, :, :longest] = turned(states, index)

    def copy(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        super().copy(rows, origins, longest)
        for buffer in self.buffers:
            buffer[rows, :, :longest] = buffer[origins, :, :longest]

    def start(self, rows: Tensor) -> None:
        super().start(rows)
        if self.accumulators is not None:
            self.accumulators[rows] = self.first_accumulator

    def aim(self, step: Step) -> None:
        super().aim(step)
        self.rows, self.place, self.limit = step.rows, step.place, step.limit
        # What the PTE layer reads.
        self.accumulator = None if self.accumulators is None else self.accumulators[: len(step.rows)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.place] = states[:, :, 0]
        # All places, seen or not: the mask leaves out those that are empty or evicted.
        return tuple(buffer[: len(self.rows), :, : self.limit] for buffer in self.buffers)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.buffers, *([] if self.accumulators is None else [self.accumulators])]


class RingSliding(RingPart, SlidingLayer):
    """Sliding or chunked attention. `buffers`: keys and values, (rows, kv heads, size, width).

    Token i lies at i mod size. The size is the model's window, which counts the token that attends: once a token is
    written, the ring holds what it sees and nothing else. Where no row gets that long, the size is what one needs.
    """

    def __init__(self, source: SlidingLayer):
        SlidingLayer.__init__(self, source.sliding_window)
        self.buffers = None

    def begin(self, source: SlidingLayer, sizes: Sizes) -> None:
        super().begin(source, sizes)
        if self.buffers is None:
            size = min(self.sliding_window, aligned(sizes.tokens))
            self.buffers = tuple(buffer_for(x, sizes.rows, size) for x in (source.keys, source.values))

    @property
    def size(self) -> int:
        """Places of the ring."""
        return self.buffers[0].shape[2]

    def load(self, rows: Tensor, source: SlidingLayer, lengths: Tensor, longest: int) -> None:
        super().load(rows, source, lengths, longest)
        # All places: what another sequence has left there must not come back.
        index = columns(lengths, source.keys.shape[2], self.size, self.size)
        for buffer, states in zip(self.buffers, (source.keys, source.values), strict=True):
            buffer[rows] = turned(states, index)

    def copy(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        super().copy(rows, origins, longest)
        for buffer in self.buffers:
            buffer[rows] = buffer[origins]

    def aim(self, step: Step) -> None:
        super().aim(step)
        self.rows, self.place = step.rows, step.near

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.place] = states[:, :, 0]
        return tuple(buffer[: len(self.rows)] for buffer in self.buffers)

    def overwritten(self) -> list[Tensor]:
        return [*super().overwritten(), *self.buffers]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.buffers]


class RingStates(RingPart, LinearAttentionLayer):
    """A recurrent layer: `states` are its tensors by their names in `held`, (rows, ...).

    The model reads and writes those of the first rows as views. transformers' own layer writes in place, and so do
    its fused kernels, as a captured graph needs it.
    """

    def __init__(self, source: RecurrentLayer):
        LinearAttentionLayer.__init__(self, source.number_of_states)
        self.states: dict[str, Tensor] | None = None

    def begin(self, source: RecurrentLayer, sizes: Sizes) -> None:
        super().begin(source, sizes)
        if self.states is None:
            self.states = {name: x.new_zeros(sizes.rows, *x.shape[1:]) for name, x in states_of(source).items()}
            for name in ("conv_kernel_size", "is_conv_states_initialized", "is_recurrent_states_initialized"):
                setattr(self, name, dict(getattr(source, name)))
            self.has_previous_state = dict(source.has_previous_state)
            self.dtype, self.device = source.dtype, source.device

    def load(self, rows: Tensor, source: RecurrentLayer, lengths: Tensor, longest: int) -> None:
        super().load(rows, source, lengths, longest)
        for name, states in states_of(source).items():
            self.states[name][rows] = states

    def copy(self, rows: Tensor, origins: Tensor, longest: int) -> None:
        super().copy(rows, origins, longest)
        for states in self.states.values():
            states[rows] = states[origins]

    def aim(self, step: Step) -> None:
        super().aim(step)
        for name, states in self.states.items():
            kind, index = name.split(".")
            getattr(self, kind)[int(index)] = states[: len(step.rows)]

    def overwritten(self) -> list[Tensor]:
        return [*super().overwritten(), *self.states.values()]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.states.values()]


def states_of(source: RecurrentLayer) -> dict[str, Tensor]:
    """Conv and recurrent states of a cache layer, without the keys and values of a hybrid one."""
    return {name: x for name, x in held(source).items() if "." in name}


class RingHybrid(RingStates, RingLayer):
    """Full attention and a recurrent state in one layer."""

    def __init__(self, source: HybridLayer):
        RingStates.__init__(self, source)
        RingLayer.__init__(self, source)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        BoundedLayer.lazy_initialization(self, key_states, value_states)

    def reset(self) -> None:
        RingLayer.reset(self)


class RingSlidingHybrid(RingStates, RingSliding):
    """Sliding attention and a recurrent state in one layer."""

    def __init__(self, source: SlidingHybridLayer):
        RingStates.__init__(self, source)
        RingSliding.__init__(self, source)


RINGS: dict[type, type[RingPart]] = {
    BoundedLayer: RingLayer,
    SlidingLayer: RingSliding,
    RecurrentLayer: RingStates,
    HybridLayer: RingHybrid,
    SlidingHybridLayer: RingSlidingHybrid,
}
