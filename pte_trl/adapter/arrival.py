"""Keys and values as they arrive at a cache, whatever a family does to them: norms, rotary or none, compression.

An attention module hands them to `past_key_values.update`. A `Probe` in the place of the cache ends the forward there;
a `Recorder` reads them and lets it go on; a `Given` lets it go on with what a probe has found before. So nothing here
knows what a family computes, and what PTE encodes in a replay is what a cache would have held.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.precision import cast_by_autocast, without_autocast

Pick = Callable[[Tensor], Tensor]  # (..., length, width) of some tokens -> of others


class Arrived(Exception):
    """Ends a forward: keys and values, (batch, kv heads, length, width) each, have reached the cache."""


class Probe:
    """In the place of a cache: ends the attention's forward when keys and values arrive."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise Arrived(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # a replay begins with the prompt


class Recorder(Probe):
    """In the place of a cache: hands what arrives to a function, and the attention goes on with it."""

    def __init__(self, arrived: Callable[[Tensor, Tensor], None]):
        self.arrived = arrived

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.arrived(keys, values)
        return keys, values


class Given(Probe):
    """In the place of a cache: the attention goes on with keys and values that are known, whatever it hands over."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True)
class Call:
    """The arguments with which a decoder layer calls its attention, hidden states left out.

    Those with an entry for every token are `position_embeddings`, one tensor or several (..., length, width), and
    `position_ids`, (..., length).
    """

    arguments: dict[str, Any]

    @classmethod
    def of(cls, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """Of what a module was called with, the hidden states first or by name."""
        names = list(signature(attention.forward).parameters)[1:] if len(args) > 1 else ()
        named = dict(zip(names, args[1:], strict=False))
        return cls({name: x for name, x in {**named, **kwargs}.items() if name != "hidden_states"})

    def at(self, pick: Pick) -> "Call":
        """The same call for other tokens."""
        return self._with(lambda tensors: tuple(map(pick, tensors)), lambda x: pick(x.unsqueeze(-1)).squeeze(-1))

    def without_position(self, tokens: int) -> "Call":
        """The same call for a row of `tokens` tokens that no rotary embedding changes: cos 1, sin 0, position 0."""
        return self._with(lambda tensors: unrotated(tensors, tokens), lambda ids: first_position(ids, tokens))

    def followed_by_unrotated(self, tokens: int, plan: ReplayPlan) -> "Call":
        """The same call where every row has `tokens` more tokens at its end, as in `without_position`."""

        def longer(x: Tensor, more: Tensor, dim: int) -> Tensor:
            with without_autocast(x.device):  # which knows no concatenation of some dtypes
                return torch.cat([x, more.expand(*x.shape[:dim], *more.shape[dim:])], dim=dim)

        def embeddings(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(tensors, unrotated(tensors, tokens), strict=True)
            return tuple(longer(*pair, dim=-2) for pair in pairs)

        # Made once for all layers that have the same.
        return self._with(
            lambda tensors: plan.kept_of(tensors[0], ("embeddings", tokens), lambda: embeddings(tensors)),
            lambda ids: plan.kept_of(ids, ("ids", tokens), lambda: longer(ids, first_position(ids, tokens), dim=-1)),
        )

    def _with(self, embeddings: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], ids: Pick) -> "Call":
        found = dict(self.arguments)
        held = found.get("position_embeddings")
        if isinstance(held, (tuple, list)):
            found["position_embeddings"] = embeddings(tuple(held))
        elif held is not None:
            (found["position_embeddings"],) = embeddings((held,))
        if isinstance(found.get("position_ids"), Tensor):
            found["position_ids"] = ids(found["position_ids"])
        return Call(found)


def unrotated(tensors: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
    """Rotary embeddings, like these, that change nothing: (..., 1, tokens, width) each."""
    # A pair is (cos, sin); one tensor is complex numbers of length 1.
    makers = (torch.ones, torch.zeros) if len(tensors) == 2 else (torch.ones,)
    like = zip(makers, tensors, strict=True)
    return tuple(make((*x.shape[:-3], 1, tokens, x.shape[-1]), dtype=x.dtype, device=x.device) for make, x in like)


def first_position(ids: Tensor, tokens: int) -> Tensor:
    """Position 0, (..., 1, tokens)."""
    return ids.new_zeros(*ids.shape[:-2], 1, tokens)


@contextmanager
def calls_of(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """How each of these `PteAttention`s is called inside, the last time."""
    found: dict[nn.Module, Call] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found[layer] = Call.of(layer.base_layer, args, kwargs)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def arriving(attention: nn.Module, hidden: Tensor, call: Call, unused: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """Keys and values of `hidden` as a cache would get them, (batch, kv heads, length, width) each.

    `forward`, not the module: a forward that an exception ends would skip the module's hooks.

    Args:
        unused: linears that are not run, since keys and values do not depend on them.

    Raises:
        ValueError: the attention hands none to a cache.
    """
    with zeros_from(unused):
        try:
            attention.forward(hidden, **{**call.arguments, "past_key_values": Probe()})
        except Arrived as arrived:
            return arrived.args
    raise ValueError(f"{type(attention).__name__} hands no keys and values to a cache: there is nothing to encode")


@contextmanager
def zeros_from(linears: list[nn.Module]) -> Iterator[None]:
    """Linears that give zeros without computing anything; their hooks run all the same."""
    own, made = [linear.__dict__.get("forward") for linear in linears], {}
    for linear in linears:
        width = getattr(linear, "base_layer", linear).out_features
        linear.forward = partial(_zeros, width, made)
    try:
        yield
    finally:
        for linear, forward in zip(linears, own, strict=True):
            if forward is None:
                del linear.forward  # the class's own again
            else:
                linear.forward = forward


def _zeros(width: int, made: dict[int, Tensor], x: Tensor) -> Tensor:
    if width not in made:
        (made[width],) = cast_by_autocast(x.new_zeros(width))  # as a linear does
    return made[width].expand(*x.shape[:-1], width)  # stride 1, as complex rotary embeddings want it
