"""The decode step compiled by `torch.compile`; the eager step (`Engine._forward`) is its reference and its fall-back.

What lies between the attention of one layer and that of the next is one function: the output projection, the MLP, and
the next layer's projections, rotary embedding and write into the cache. It is compiled once and serves all layers, as
these differ in tensors alone (`pte_trl.rollouts.decoder`). The attention itself stays PyTorch's own kernel, so the
compiled code does not depend on how much of the cache is in use, only on the number of rows.

Elementwise work is fused by the compiler, about 14 launches are left per layer without an adapter. Matrices that share
an input (queries, keys and values; gate and up) stay products of their own: one product needs their weights in one
piece of memory, which would be a second copy of them.
"""

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from pte_trl.cache.masks import additive
from pte_trl.compat.torch import any_size, forward_hooks
from pte_trl.replay.attention import one_query
from pte_trl.rollouts.decoder import After, Before, Decoder, Norm, Projection, Unsupported
from pte_trl.rollouts.ring import RingCache

# ---- what is compiled: functions of tensors, all of them (rows, 1, ...), of one token per row --------------------

# Of three dimensions, since a sum of two matrices, of which one is a product, would become one operation of the BLAS
# library, which first copies the other: more launches than an addition that is fused with the norm behind it.


def normed(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm as the models have it, in float32 inside."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; x: (rows, 1, width)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return linear(x, weight, bias)
    # As (W x^T)^T: MKL takes a third less time for 16 rows where the long side comes first (docs/log.md).
    out = (weight @ x.squeeze(1).t()).t().contiguous().unsqueeze(1)
    return out if bias is None else out + bias


def projected(x: Tensor, by: Projection, state: Tensor | None) -> Tensor:
    """W x + b + scale * up(x S); S is (rows, n_g, r), None where nothing is between down and up."""
    bias = None if by.bias is None else by.bias.to(by.dtype)
    out = product(x.to(by.dtype), by.weight.to(by.dtype), bias)
    if by.down is None:
        return out
    inner = linear(x.to(by.down.dtype), by.down)
    if state is not None:
        # A row times a matrix, as a sum: unlike a product it is fused with the casts, and never in TF32.
        inner = (inner.to(state.dtype).unsqueeze(-1) * state.unsqueeze(1)).sum(-2)
    outer = linear(inner.to(by.up.dtype), by.up)
    return out + (by.scale * outer).to(out.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; x: (rows, 1, heads, head_dim), cos and sin as `signed` returns them."""
    # Halves are swapped as a view, which is fused; a concatenation is not everywhere.
    return x * cos + x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A model's rotary embedding, both (rows, 1, head_dim), for `rotated`: (rows, 1, 1, head_dim), and the sign that
    half of the swapped entries need is with the sine."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)


def before_attention(hidden: Tensor, by: Before, state: Tensor | None, rotary: tuple, cache: tuple) -> Tensor:
    """Queries (rows, 1, heads, head_dim) of the tokens; their keys and values are written into the cache.

    Args:
        rotary: what `signed` returns.
        cache: buffers of keys and values, the rows' numbers and the place of the token in each.
    """
    keys, values, rows, place = cache
    x = normed(hidden, by.norm)
    head_dim = rotary[0].shape[-1]
    query, key, value = (
        projected(x, part, state).unflatten(-1, (-1, head_dim)) for part in (by.query, by.key, by.value)
    )
    query = query if by.query_norm is None else normed(query, by.query_norm)
    key = key if by.key_norm is None else normed(key, by.key_norm)
    keys[rows, :, place] = rotated(key, *rotary)[:, 0].to(keys.dtype)
    values[rows, :, place] = value[:, 0].to(values.dtype)
    return rotated(query, *rotary)


def after_attention(hidden: Tensor, attended: Tensor, by: After, state: Tensor | None) -> Tensor:
    """The layer's output, (rows, 1, d_model)."""
    hidden = hidden + projected(attended, by.output, state)
    x = normed(hidden, by.norm)
    x = silu(projected(x, by.gate, state)) * projected(x, by.up, state)
    return hidden + projected(x, by.down, state)


def between_attentions(
    hidden: Tensor,
    attended: Tensor,
    after: After,
    old: Tensor | None,
    before: Before,
    new: Tensor | None,
    rotary: tuple,
    cache: tuple,
) -> tuple[Tensor, Tensor]:
    """The output of a layer, whose S is `old`, and the queries of the next, whose S is `new`."""
    hidden = after_attention(hidden, attended, after, old)
    return hidden, before_attention(hidden, before, new, rotary, cache)


def after_last_attention(hidden: Tensor, attended: Tensor, by: After, state: Tensor | None, norm: Norm) -> Tensor:
    """What the LM head takes."""
    return normed(after_attention(hidden, attended, by, state), norm)


PARTS = (before_attention, between_attentions, after_last_attention)


@functools.lru_cache(maxsize=16)
def compiled_parts(kind: tuple) -> tuple[Callable, ...]:
    """PARTS, compiled for one kind of layer; they outlive the engine, whose next one finds them ready.

    A kind has functions of its own, since torch allows a function only so many versions: here one for the first
    number of rows, one for any number, and one for a single row.
    """
    own = (FunctionType(part.__code__.replace(), part.__globals__, part.__name__) for part in PARTS)
    # No CUDA graphs by torch: the engine captures the whole step itself.
    return tuple(torch.compile(part, fullgraph=True, options={"triton.cudagraphs": False}) for part in own)


# ---- the step ----------------------------------------------------------------------------------------------------


class CompiledStep:
    """The logits of one step of an engine.

    Args:
        model: the engine's.
        cache: the engine's; it is filled with prompts before the first step.
        compile: False runs the same functions eagerly, for tests.
    """

    def __init__(self, model: nn.Module, cache: RingCache, compile: bool = True):
        self.decoder, self.cache, self.compile = Decoder(model), cache, compile
        self.buffers: list[tuple[Tensor, Tensor]] = []  # of the cache, once it has some

    def refresh(self) -> None:
        """Reads the weights and adapters of now; to be called before every rollout, under its autocast.

        Raises:
            Unsupported: the model has what this step does not know.
        """
        self.layers, self.norm = self.decoder.read()
        self.dtype = self.decoder.autocast
        kind = tuple(_kind(part) for part in (self.layers[0].before, self.layers[0].after, self.norm))
        head = self.decoder.base.lm_head
        plain = type(head) is nn.Linear and not forward_hooks(head) and "forward" not in head.__dict__
        self.plain_head = plain and self.dtype is None  # autocast chooses the precision itself
        self.parts = compiled_parts((self.decoder.base.device, *kind)) if self.compile else PARTS

    def __call__(self, token: Tensor, position: Tensor, rows: Tensor, place: Tensor, limit: int) -> Tensor:
        """(rows, vocabulary) logits after `token`.

        Args:
            token, position, rows, place: (rows,); rows are the first ones.
            limit: places of the cache that attention sees.
        """
        body, layers = self.decoder.base.model, self.layers
        if not self.buffers:
            self._begin()
        hidden = body.embed_tokens(token.unsqueeze(1))
        rotary = signed(*body.rotary_emb(hidden, position.unsqueeze(1)))
        if rotary[0].shape[-1] != self.buffers[0][0].shape[-1]:
            raise Unsupported(f"rotary embedding of {rotary[0].shape[-1]} of the dimensions of a head")
        mask = additive(self.cache.seen[: len(rows), None, None, :limit], self.dtype or hidden.dtype)
        states = [self._state(index, len(rows)) for index in range(len(layers))]
        places = [(*buffers, rows, place) for buffers in self.buffers]
        before, between, after = self.parts
        # Without autocast: the precision of every product is written down in `Projection`.
        with torch.autocast(token.device.type, enabled=False):
            query = before(hidden, layers[0].before, states[0], rotary, places[0])
            for index in range(len(layers) - 1):
                attended, mine, following = self._attend(index, query, mask), layers[index], layers[index + 1]
                old, new = states[index : index + 2]
                hidden, query = between(
                    hidden, attended, mine.after, old, following.before, new, rotary, places[index + 1]
                )
            hidden = after(hidden, self._attend(-1, query, mask), layers[-1].after, states[-1], self.norm)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.decoder.base.lm_head
        logits = product(hidden, head.weight, head.bias) if self.plain_head else head(hidden)
        return logits[:, 0]

    def _begin(self) -> None:
        self.buffers = [layer.buffers for layer in self.cache.layers]
        for buffer in (buffer for pair in self.buffers for buffer in pair):
            # What is compiled then serves the next engine too, which may have other rows and places.
            any_size(buffer, 0, 2)

    def _state(self, index: int, rows: int) -> Tensor | None:
        state = self.layers[index].state
        return None if state is None else state(self.cache.layers[index].accumulators[:rows])

    def _attend(self, index: int, query: Tensor, mask: Tensor) -> Tensor:
        """(rows, 1, heads * head_dim)."""
        rows, limit = len(query), mask.shape[-1]
        keys, values = (buffer[:rows, :, :limit].to(mask.dtype) for buffer in self.buffers[index])
        scale = self.layers[index].scale
        return one_query(query.transpose(1, 2).to(mask.dtype), keys, values, mask, 0.0, scale).flatten(2)


def _kind(part):
    """What the compiled code depends on: shapes, dtypes and constants."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype
    return tuple(map(_kind, part)) if isinstance(part, tuple) else part


@functools.cache
def say(sentence: str) -> None:
    """Prints a sentence the first time it is given."""
    print(sentence, flush=True)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing can be tried again then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
