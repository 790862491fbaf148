"""x S of a replay, where S differs from token to token, and what of it an eviction takes: each one node of the graph.

The plan names tokens by places, some of which are empty. Reading an empty place gives zeros; what is written to one
goes to a row behind the last, which nobody reads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pte_trl.replay.plan import Places, ReplayPlan
from pte_trl.replay.precision import own_precision


def routed(x: Tensor, first: Tensor, later: Tensor, plan: ReplayPlan) -> Tensor:
    """x S_k of every token, k its own.

    Args:
        x: (batch, length, m).
        first: S_0, (m, n) or (batch, m, n), of all tokens that `plan.users` does not name.
        later: S_1 .. S_J of those that it names, (batch, J, m, n).

    Returns:
        (batch, length, n).
    """
    return _Routed.apply(x, first, later, plan.places("users"))


def evicted_products(keys: Tensor, values: Tensor, plan: ReplayPlan) -> Tensor:
    """K^T V of the tokens that leave together: (batch, length, r) twice -> (batch, J, r, r)."""
    return _Evicted.apply(keys, values, plan.places("evicted"))


class _Routed(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, x: Tensor, first: Tensor, later: Tensor, places: Places) -> Tensor:
        taken = places.read(x)
        out = places.with_spare(x, first.shape[-1])
        _product(x, first, out)
        places.write(out, taken @ later)
        ctx.save_for_backward(x, first, later, taken)
        ctx.places = places
        return out[:-1].view(*x.shape[:2], -1)

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, later, taken = ctx.saved_tensors
        places, needs = ctx.places, ctx.needs_input_grad
        grad_x = grad_first = grad_later = None
        grad_taken = places.read(grad, zeros=False)  # of empty places only what is written to the spare row is wrong
        if needs[0]:
            grad_x = places.with_spare(x, x.shape[-1])
            _product(grad, first.transpose(-2, -1), grad_x)
            places.write(grad_x, grad_taken @ later.transpose(-2, -1))
            grad_x = grad_x[:-1].view_as(x)
        if needs[1]:
            others = x * places.unnamed
            both = (others.flatten(0, 1), grad.flatten(0, 1)) if first.dim() == 2 else (others, grad)
            grad_first = both[0].transpose(-2, -1) @ both[1]
        if needs[2]:
            grad_later = taken.transpose(-2, -1) @ grad_taken
        return grad_x, grad_first, grad_later, None


class _Evicted(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, keys: Tensor, values: Tensor, places: Places) -> Tensor:
        left, right = places.read(keys), places.read(values, zeros=False)
        ctx.save_for_backward(left, right)
        ctx.places, ctx.like = places, keys.shape
        return left.transpose(-2, -1) @ right

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        found = []
        for rows in (right @ grad.transpose(-2, -1), left @ grad):
            whole = rows.new_zeros(ctx.like[:2].numel() + 1, ctx.like[2])
            ctx.places.write(whole, rows)
            found.append(whole[:-1].view(ctx.like))
        return *found, None


def _product(x: Tensor, state: Tensor, out: Tensor) -> None:
    """x (batch, length, m) times a state (m, n) or (batch, m, n), into all rows of `out` but the last."""
    if state.dim() == 2:
        torch.mm(x.reshape(-1, x.shape[-1]), state, out=out[:-1])
    else:
        torch.bmm(x, state, out=out[:-1].view(*x.shape[:2], -1))
