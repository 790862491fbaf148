"""The recursion of eq. 4 over all evictions of a replay, S_k = Norm(S_(k-1) + S'_k), as one node of the graph.

Forward it is sequential: S_k depends on the norm of what came before. Step by step it is two operations for every
eviction; on CUDA one Triton kernel does all of them (`pte_trl.adapter.recursion_kernel`), with the steps as its
reference.

Backward it is linear. With X_k = S_(k-1) + S'_k, c_k = 1 / rms(X_k), N entries under one norm and h_k the whole
gradient of S_k, that of X_k is

    x_k = c_k (h_k - d_k S_k)      d_k = <S_k, h_k> / N      h_k = (given gradient of S_k) + x_(k+1)

Written out, the d_k solve a triangular system whose coefficients are products of states with states and with given
gradients. So the backward is a few matrix products and one solve for CHUNK evictions at a time, not a loop.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

from pte_trl.adapter import recursion_kernel
from pte_trl.replay.precision import own_precision

NORM_EPS = 1e-6
CHUNK = 64  # evictions of one triangular system: its size is the square of that
# The logarithm of `reach` at most. A state of zeros has c = 1 / sqrt(eps), whose powers overflow; without a bound the
# gradient of a sample that evicts nothing would be inf * 0 where there are no global tokens.
MOST_REACH = 80.0


def root_mean_square(state: Tensor, normalisation: str) -> Tensor:
    """Norm of eq. 4: divide by the root mean square of the matrix ("rms") or of each of its rows ("row")."""
    dims = 2 if normalisation == "rms" else 1
    return rms_norm(state, state.shape[-dims:], eps=NORM_EPS)


def recursion(start: Tensor, updates: Tensor, normalisation: str) -> Tensor:
    """States after every eviction.

    Args:
        start: S_0, (n_g, r) or (batch, n_g, r).
        updates: S' of every eviction, (batch, J, n_g, r).
        normalisation: "rms" or "row".

    Returns:
        (batch, J, n_g, r): S_1 .. S_J.
    """
    return _Recursion.apply(start, updates, normalisation)


def step_by_step(start: Tensor, updates: Tensor, normalisation: str) -> Tensor:
    """The same, in the plainest form: the reference."""
    states, state = [], start
    for update in updates.unbind(1):
        state = root_mean_square(state + update, normalisation)
        states.append(state)
    return torch.stack(states, dim=1)


class _Recursion(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, start: Tensor, updates: Tensor, normalisation: str) -> Tensor:
        if recursion_kernel.usable(updates, normalisation):
            states = recursion_kernel.forward(start, updates, normalisation, NORM_EPS)
        else:
            states = step_by_step(start, updates, normalisation)
        ctx.save_for_backward(start, updates, states)
        ctx.normalisation = normalisation
        return states

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        start, updates, states = ctx.saved_tensors
        if recursion_kernel.usable(updates, ctx.normalisation):
            found = recursion_kernel.backward(start, updates, states, grad, ctx.normalisation, NORM_EPS)
        else:
            found = by_systems(start, updates, states, grad, ctx.normalisation)
        first = found[:, 0]
        return first if start.dim() == 3 else first.sum(0), found, None


def by_systems(start: Tensor, updates: Tensor, states: Tensor, grad: Tensor, normalisation: str) -> Tensor:
    """Gradients of the updates, (batch, J, n_g, r), by triangular systems."""
    start = start.expand(len(updates), -1, -1).unsqueeze(1)
    before = torch.cat([start, states[:, :-1]], dim=1)
    dims = (-2, -1) if normalisation == "rms" else (-1,)
    scales = ((before + updates).square().mean(dims) + NORM_EPS).rsqrt()  # c_k: (batch, J) or (batch, J, n_g)

    def rows(x: Tensor) -> Tensor:
        """(batch, J, n_g, r) -> (independent recursions, J, entries under one norm)."""
        return x.flatten(2) if normalisation == "rms" else x.transpose(1, 2).flatten(0, 1)

    scales = scales if normalisation == "rms" else scales.transpose(1, 2).flatten(0, 1)
    states, grad = rows(states), rows(grad)
    found, later = [], None
    for end in range(states.shape[1], 0, -CHUNK):
        part = slice(max(0, end - CHUNK), end)
        given = grad[:, part]
        if later is not None:  # the first of what follows gives its gradient to the last of these
            given = torch.cat([given[:, :-1], (given[:, -1] + later).unsqueeze(1)], dim=1)
        found.insert(0, _system(states[:, part], given, scales[:, part]))
        later = found[0][:, 0]
    found = torch.cat(found, dim=1) if len(found) > 1 else found[0]
    return found.view_as(updates) if normalisation == "rms" else found.unflatten(0, (len(updates), -1)).transpose(1, 2)


def _system(states: Tensor, given: Tensor, scales: Tensor) -> Tensor:
    """Gradients of X_k: states and their given gradients (n, J, N), scales (n, J) -> (n, J, N)."""
    size, entries = states.shape[1:]
    # reach[k, j] = c_(k+1) ... c_j for j >= k: what of the gradient of S_j arrives at S_k, projections left out.
    logs = scales.log().cumsum(1)
    above = torch.ones(size, size, dtype=torch.bool, device=states.device).triu()
    reach = (logs.unsqueeze(1) - logs.unsqueeze(2)).clamp(max=MOST_REACH).masked_fill(~above, float("-inf")).exp()
    # N d_k + sum over j > k of reach[k, j] <S_k, S_j> d_j = <S_k, sum over j >= k of reach[k, j] given_j>. The solver
    # reads what is above the diagonal and takes the diagonal as 1.
    right = (states * (reach @ given)).sum(2, keepdim=True) / entries
    system = reach * (states @ states.transpose(1, 2)) / entries
    along = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
    # h_k - d_k S_k, with what comes from later states.
    return scales.unsqueeze(2) * (reach @ (given - along * states))
