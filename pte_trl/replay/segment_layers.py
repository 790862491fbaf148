"""What a segment finds and leaves: keys and values of the whole text, and cache layers that are fed segments.

Keys and values of a token are the same in every segment that sees them, so `Past` has them once, with one gradient
each. Everything else that a layer carries from token to token (the encoder's accumulator, the states of a recurrent
layer) is handed from one segment to the next, and its gradient back.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pte_trl.cache.bounded_layer import BoundedLayer, Rows
from pte_trl.cache.layers import KINDS, HybridLayer, SlidingHybridLayer, SlidingLayer, copied, held, hold
from pte_trl.transfer import fetched, offloaded

KEYS_VALUES = ("keys", "values")
Piece = tuple[int, slice]  # a segment, and tokens of it
Kept = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer, of those that attend


class Past:
    """Keys and values of a text, and gradients for them: a tensor for every segment and layer.

    A token's gradient has one place, into which each segment that sees the token adds its own, and no segment hands on
    gradients of a whole cache.
    """

    def __init__(self, spans: list[range], store_on: torch.device):
        self.spans, self.store_on = spans, store_on
        self.kept: list[Kept | None] = []  # by segment
        self.gradients: dict[tuple[int, int], list[Tensor | None]] = {}  # of segment and layer, where there are any

    def keep(self, layers: Sequence[Rows]) -> None:
        """Stores the keys and values that the next segment has added."""
        self.kept.append({})
        for at, layer in enumerate(layers):
            if isinstance(layer, Fed):
                self.kept[-1][at] = tuple(offloaded(x, self.store_on) for x in layer.new)
                layer.new = ()

    def pieces(self, *seen: range) -> list[Piece]:
        """Where tokens lie; thought tokens are numbered from 0, those of the prompt below."""
        return [
            (segment, slice(max(some.start, span.start) - span.start, min(some.stop, span.stop) - span.start))
            for some in seen
            for segment, span in enumerate(self.spans)
            if max(some.start, span.start) < min(some.stop, span.stop)
        ]

    def gather(self, layer: int, pieces: list[Piece], device: torch.device) -> tuple[Tensor, ...]:
        """Keys and values of the pieces, in a row."""
        length = sum(part.stop - part.start for _, part in pieces)
        found = []
        for which in range(2):
            like = self.kept[0][layer][which]
            row, at = like.new_empty(*like.shape[:2], length, like.shape[3], device=device), 0
            for segment, part in pieces:
                size = part.stop - part.start
                row[:, :, at : at + size] = fetched(self.kept[segment][layer][which], device)[:, :, part]
                at += size
            found.append(row)
        return tuple(found)

    def add(self, layer: int, pieces: list[Piece], grads: Sequence[Tensor | None]) -> None:
        """Adds to the gradients of the pieces."""
        for which, grad in enumerate(grads):
            at = 0
            for segment, part in pieces if grad is not None else ():
                totals, size = self.gradients.setdefault((segment, layer), [None, None]), part.stop - part.start
                if totals[which] is None:
                    totals[which] = grad.new_zeros(self.kept[segment][layer][which].shape)
                totals[which][:, :, part] += grad[:, :, at : at + size]
                at += size

    def drop(self, segment: int) -> None:
        """Forgets a segment whose backward is done: the ones before it have never seen it."""
        self.kept[segment] = None
        self.gradients = {place: totals for place, totals in self.gradients.items() if place[0] != segment}


class _Fetch(torch.autograd.Function):
    """Keys and values of the past, which go into the graph without one tensor of it being held for that."""

    @staticmethod
    def forward(ctx, anchor: Tensor, past: Past, layer: int, pieces: list[Piece]):
        ctx.add = partial(past.add, layer, pieces)
        ctx.set_materialize_grads(False)
        return past.gather(layer, pieces, anchor.device)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.add(grads)
        return None, None, None, None


def fetching(anchor: Tensor, past: Past, layer: int, pieces: list[Piece]) -> Callable[[], tuple[Tensor, Tensor]]:
    """What `Fed.fetch` is: gives keys and values of a layer, and takes their gradients.

    Args:
        anchor: a value that requires a gradient, in the graph of everything that comes from the past.
    """
    return partial(_Fetch.apply, anchor, past, layer, pieces)


class Fed:
    """Base of the layers with keys and values that are fed segments.

    Going backward such a layer is made for one segment: what it holds is fetched when the model reaches it, and
    released.

    Attributes:
        fetch: gives the keys and values before the segment; None for a prompt, and going forward.
        new: keys and values of the segment itself.
    """

    fetch: Callable[[], tuple[Tensor, Tensor]] | None = None
    new: tuple[Tensor, Tensor] = ()

    def sees(self, fed: int) -> tuple[range, ...]:
        """The tokens before thought token `fed` that the layer holds, numbered as by `Past.pieces`."""
        raise NotImplementedError

    def _fetch(self) -> None:
        if self.fetch is not None:
            self.keys, self.values = self.fetch()
            self.fetch = None


class SegmentLayer(Fed, BoundedLayer):
    """A bounded layer that is fed segments, each perhaps with several evictions."""

    def sees(self, fed: int) -> tuple[range, ...]:
        oldest = self.schedule.first_visible(fed - 1) if fed else 0  # what the token before left there
        return range(-self.prompt, 0), range(oldest, fed)

    def make_room(self, length: int, encode: Callable[[Tensor, Tensor, int], None] | None = None) -> None:
        """Lets leave what has to before the last of `length` tokens, which may be some of these tokens.

        Args:
            length: tokens fed next.
            encode: called with the keys and values that leave, eviction by eviction in a row, and with the number of
                evictions. Those of the tokens fed next are not here yet, so they are missing at the end.

        Only what leaves before the first token is dropped: the first tokens still see the rest.
        """
        self._fetch()
        if self.in_prompt():
            return
        due = self.schedule.evictions_before(self.fed + length - 1) - self.evicted
        if due == 0:
            return
        leaving = slice(self.prompt, self.prompt + due * self.schedule.evict)
        if encode is not None:
            encode(self.keys[:, :, leaving], self.values[:, :, leaving], due)
        self._drop(self.schedule.evictions_before(self.fed) - self.evicted)
        self.evicted += due

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        length, prompt = key_states.shape[2], self.in_prompt()
        self.make_room(length)
        self.new = (key_states, value_states)
        if prompt:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values, self.prompt = key_states, value_states, length
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        found = self.keys, self.values
        if torch.is_grad_enabled():
            self.keys = self.values = None
        elif not prompt:
            self._drop(self.evicted - self.schedule.evictions_before(self.fed))
        self.fed += 0 if prompt else length
        return found

    def _drop(self, evictions: int) -> None:
        """Forgets the oldest thought tokens, as many as so many evictions take."""
        if evictions:
            stop = self.prompt + evictions * self.schedule.evict
            self.keys, self.values = (self._without(x, self.prompt, stop) for x in (self.keys, self.values))


class SegmentSlidingLayer(Fed, SlidingLayer):
    """A layer with a window of its own that is fed segments."""

    def sees(self, fed: int) -> tuple[range, ...]:
        return (range(fed - min(self.cumulative_length, self.sliding_window - 1), fed),)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._fetch()
        self.new = (key_states, value_states)
        found = super().update(key_states, value_states, *args, **kwargs)
        if torch.is_grad_enabled():
            self.keys = self.values = None
        return found


class SegmentHybridLayer(HybridLayer, SegmentLayer):
    """Bounded attention and a recurrent state."""

    attention = SegmentLayer


class SegmentSlidingHybridLayer(SlidingHybridLayer, SegmentSlidingLayer):
    """Sliding attention and a recurrent state."""

    attention = SegmentSlidingLayer


OWN = {
    BoundedLayer: SegmentLayer,
    SlidingLayer: SegmentSlidingLayer,
    HybridLayer: SegmentHybridLayer,
    SlidingHybridLayer: SegmentSlidingHybridLayer,
}
SEGMENT_KINDS = {name: OWN.get(kind, kind) for name, kind in KINDS.items()}


def handed_on(layer: Rows) -> dict[str, Tensor]:
    """What a layer hands to the next segment, by name: all that it carries, but for keys and values."""
    return {name: x for name, x in held(layer).items() if name not in KEYS_VALUES}


class Entered:
    """The layers of a cache as a segment finds them, without keys and values."""

    def __init__(self, layers: Sequence[Rows], store_on: torch.device):
        self.layers, self.tensors = [], []
        for layer in layers:
            layer = copied(layer)
            tensors = handed_on(layer)
            if isinstance(layer, Fed):
                layer.keys = layer.values = None
            hold(layer, dict.fromkeys(tensors))
            self.layers.append(layer)
            self.tensors.append({name: offloaded(x, store_on) for name, x in tensors.items()})

    def leaves(self, device: torch.device) -> tuple[list[Rows], dict[tuple[int, str], Tensor]]:
        """The layers to feed the segment to, and the tensors in them at which gradients stop, by layer and name."""
        layers, taken = [], {}
        for at, (before, tensors) in enumerate(zip(self.layers, self.tensors, strict=True)):
            layer = copied(before)
            for name, x in tensors.items():
                taken[at, name] = fetched(x, device).detach().requires_grad_()
            hold(layer, in_use({name: taken[at, name] for name in tensors}))
            layers.append(layer)
        return layers, taken


def in_use(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a layer may take them: recurrent states as copies, since some models write into them."""
    return {name: x.clone() if "states" in name else x for name, x in tensors.items()}
