"""How evictions change what an encoder keeps: one module per value of `state_update`.

With S' = Q K^T V of the evicted tokens, Q = W_Q^a q_g, and K, V their key and value latents:

    recursive    A <- Norm(A + S')           S = A          A_0 = S_0    the text's rule
    sum          A <- A + S'                 S = Norm(A)    A_0 = S_0    the paper's figure 2
    gated_sum    A <- a A + S'               S = Norm(A)    A_0 = S_0    a: a learned number per global token
    delta        M <- M + b k (v - M^T k)^T  S = Norm(S_0 + Q M)         token by token, k of unit length, M_0 = 0

A is the *accumulator*. That of the delta rule is S_0 + Q M above M, (n_g + r, r), so that S can be read from it and
the next eviction can be computed from it alone.

With `state_per_head` every kv head has a state of its own: K and V are then the latents of that head, and Q those of
its share of the global tokens, the first n_g / H of them for the first of H heads. The states are one below the other
in S, which stays (n_g, r). Norm is that of the whole S, all else is computed for every head apart. The accumulator of
the delta rule is then S_0 + Q M above M for the first head, the same for the second, and so on: (n_g + H r, r).

Why a gate per global token: a row of A is what one global token found in all evicted tokens, so a row has one time
scale, whatever basis the values have. The gate does not depend on data. All states are then one weighted sum.

Why the delta rule goes token by token: M then depends on the order of the tokens alone, not on how many leave at once,
and with b < 2 no step can blow up. One step for the whole chunk, M + b K^T (V - K M), diverges as soon as b times the
largest eigenvalue of K K^T is above 2: with b = 1/2, five tokens with like keys.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, rms_norm

from pte_trl.adapter.recursion import NORM_EPS, recursion, root_mean_square

CHUNK = 64  # evictions of one weighted sum: its weights grow with the square of that
SOLVED = 64  # evicted tokens of one triangular system, for the same reason
GATE = 4.0  # a = sigmoid(4) = 0.98 at the start: nearly the sum
RATE = 0.0  # b = sigmoid(0) = 1/2 at the start


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Sum(nn.Module):
    """A <- A + S', S = Norm(A).

    Args:
        heads: H, how many states there are; 1 but for `state_per_head`.

    Attributes:
        additive: whether an eviction adds S' = Q K^T V, a sum over its tokens.
        unit_keys: whether the length of the key latents has no effect.
    """

    additive = True
    unit_keys = False

    def __init__(self, config, heads: int = 1):
        super().__init__()
        self.normalisation = config.normalisation
        self.heads = heads

    def first(self, state: Tensor) -> Tensor:
        """S_0, (n_g, r) -> the accumulator before any eviction."""
        return state

    def update(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the accumulator needs to know of tokens that leave together.

        Args:
            queries: (n_g, r).
            keys, values: (…, m, H r) latents, in the order of the tokens; zeros where there is no token.

        Returns:
            (…, n_g, r): S'. The delta rule has more: (…, n_g + H r, 2 r).
        """
        return self.summed(queries, keys, values)

    def summed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Q K^T V, (…, n_g, r), whatever the rule."""
        products = self.by_head(keys).transpose(-2, -1) @ self.by_head(values)
        return self.stacked(self.split(queries) @ products)

    def by_head(self, latents: Tensor) -> Tensor:
        """(…, m, H r) -> (…, H, m, r), as it is where there is one state."""
        return latents if self.heads == 1 else latents.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def split(self, x: Tensor) -> Tensor:
        """Rows that belong to heads, (…, n, r) -> (…, H, n / H, r), as they are where there is one state."""
        return x if self.heads == 1 else x.unflatten(-2, (self.heads, -1))

    def stacked(self, x: Tensor) -> Tensor:
        """The reverse of `split`."""
        return x if self.heads == 1 else x.flatten(-3, -2)

    def written(self, update: Tensor) -> Tensor:
        """S' of an `update`, (…, n_g, r); of the delta rule, what it writes while nothing has been written."""
        return update

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        """The accumulator after one eviction."""
        return accumulator + update

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        """The accumulators after every eviction: `advance` one after another.

        Args:
            accumulator: (n, r) or (batch, n, r), before the first; n is n_g, or n_g + H r of the delta rule.
            updates: (batch, J, …).

        Returns:
            (batch, J, n, r).
        """
        return accumulator.unsqueeze(-3) + updates.cumsum(1)

    def state(self, accumulator: Tensor) -> Tensor:
        """S, (…, n_g, r)."""
        return root_mean_square(accumulator, self.normalisation)


class Recursive(Sum):
    """A <- Norm(A + S'), S = A."""

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        return root_mean_square(accumulator + update, self.normalisation)

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        return recursion(accumulator, updates, self.normalisation)

    def state(self, accumulator: Tensor) -> Tensor:
        return accumulator


class GatedSum(Sum):
    """A <- a A + S', S = Norm(A), with a = sigmoid(gate) for every row of A."""

    def __init__(self, config, heads: int = 1):
        super().__init__(config, heads)
        self.gate = nn.Parameter(torch.full((config.num_global_tokens,), GATE))

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        return wide(self.gate).sigmoid().unsqueeze(-1) * accumulator + update

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        logs, found = logsigmoid(wide(self.gate)).view(-1, 1), []  # of a
        for part in updates.split(CHUNK, dim=1):
            at = torch.arange(1, part.shape[1] + 1, device=part.device)
            ages = at.unsqueeze(1) - at  # the update of eviction j has been multiplied by a^(k - j)
            weights = (logs.unsqueeze(2) * ages.clamp(min=0)).exp() * (ages >= 0)
            held = torch.einsum("gkj,bjgr->bkgr", weights, part)
            carried = (logs * at).exp().T.unsqueeze(2)  # (k, n_g, 1), a^k
            found.append(held + carried * accumulator.unsqueeze(-3))
            accumulator = found[-1][:, -1]
        return torch.cat(found, dim=1)


class Delta(Sum):
    """The delta rule, exactly as if the tokens of an eviction left one by one.

    With k of unit length and B = strictly lower triangle of b K K^T, what the tokens write are the rows of

        U = (1 + B)^-1 b (V - K M),    M <- M + K^T U

    which is M <- M + C - P M with C = K^T (1 + B)^-1 b V and P = K^T (1 + B)^-1 b K. Neither depends on M, so the
    triangular systems of all evictions are solved together. An update is [Q C, Q P; C, P]. Many tokens are taken in
    parts, whose C and P follow each other as those of evictions do.
    """

    additive = False
    unit_keys = True

    def __init__(self, config, heads: int = 1):
        super().__init__(config, heads)
        self.rank = config.rank
        self.rate = nn.Parameter(torch.full((1,), RATE))

    def first(self, state: Tensor) -> Tensor:
        state = self.split(state)
        nothing = state.new_zeros(*state.shape[:-2], self.rank, self.rank)
        return self.stacked(torch.cat([state, nothing], dim=-2))

    def update(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = unit(self.by_head(keys)), self.by_head(values)
        rate, found = wide(self.rate).sigmoid(), None
        for k, v in zip(keys.split(SOLVED, dim=-2), values.split(SOLVED, dim=-2), strict=True):
            # The solver reads what is below the diagonal and takes the diagonal as 1.
            overlap, right = rate * (k @ k.transpose(-2, -1)), rate * torch.cat([v, k], dim=-1)
            written = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
            part = k.transpose(-2, -1) @ written  # [C, P] of these tokens
            found = part if found is None else found + part - part[..., self.rank :] @ found
        return self.stacked(torch.cat([self.split(queries) @ found, found], dim=-2))

    def written(self, update: Tensor) -> Tensor:
        return self.stacked(self.split(update)[..., : -self.rank, : self.rank])

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        accumulator, (added, removed) = self.split(accumulator), self.split(update).chunk(2, dim=-1)
        return self.stacked(accumulator + added - removed @ accumulator[..., -self.rank :, :])

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        found = []
        for update in updates.unbind(1):
            accumulator = self.advance(accumulator, update)
            found.append(accumulator)
        return torch.stack(found, dim=1)

    def state(self, accumulator: Tensor) -> Tensor:
        return super().state(self.stacked(self.split(accumulator)[..., : -self.rank, :]))


def unit(x: Tensor) -> Tensor:
    """(…, r) rows of length 1; zeros stay zeros."""
    return rms_norm(x, x.shape[-1:], eps=NORM_EPS) * x.shape[-1] ** -0.5


UPDATES = {"recursive": Recursive, "sum": Sum, "gated_sum": GatedSum, "delta": Delta}
