"""The encoder of evicted thoughts (eq. 4): global tokens, the maps W^a, the state S and its norm.

    S_0 = Norm((W_Q^a q_g) (W_K^a k_g)^T (W_V^a v_g))        before any eviction
    S'  =      (W_Q^a q_g) (W_K^a K_e)^T (W_V^a V_e)         at an eviction
    S  <- Norm(S + S')             "recursive", the text's rule
    S   = Norm(S_0 + sum of S')    "sum", the reading of the paper's figure 2

There is no softmax: it is linear attention from the global queries to the evicted tokens. What an eviction leaves
behind is the *accumulator*, (batch, n_g, r); `state` turns it into S, which the adapted layers
use. For the recursive rule the accumulator is S itself; for the sum it is the sum before the norm.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pte_trl.adapter.recursion import recursion, root_mean_square
from pte_trl.replay.precision import without_autocast

WHITENERS = ("key_whitener", "value_whitener")
REFERENCE_EVICT = 32  # evicted tokens that the data-free initialisation assumes


class Encoder(nn.Module):
    """One layer's encoder.

    Args:
        hidden_size: d_model, the width of a global token.
        query_size: d_q, all query heads together.
        keys, values: (heads, width of a head); d_kv is their product.
        config: the `PteConfig`.

    Everything runs in float32 (or wider where the inputs are), whatever autocast says: rounding S would
    come on top of the base model's own rounding.
    """

    def __init__(self, hidden_size: int, query_size: int, keys: tuple[int, int], values: tuple[int, int], config):
        super().__init__()
        self.state_update = config.state_update
        self.normalisation = config.normalisation
        self.use_global_tokens = config.use_global_tokens
        self.global_tokens = nn.Parameter(torch.empty(config.num_global_tokens, hidden_size))
        self.query_map = nn.Linear(query_size, config.rank, bias=False)
        self.key_map = nn.Linear(math.prod(keys), config.rank, bias=False)
        self.value_map = nn.Linear(math.prod(values), config.rank, bias=False)
        # P of W^a = M P, (kv heads, head_dim, head_dim): saved with the adapter, never trained.
        for name, (heads, width) in zip(WHITENERS, (keys, values), strict=True):
            eye = torch.eye(width, dtype=torch.float32).repeat(heads, 1, 1)
            self.register_buffer(name, eye if config.whiten else None)
        self.reset_parameters(config)

    @torch.no_grad()
    def reset_parameters(self, config) -> None:
        """Scales such that |S'| of one eviction is `config.init_ratio` of |S|, for inputs of unit variance.

        An entry of S' of m evicted tokens sums r * m products of three unit normals: its deviation is
        sqrt(r * m) times that of a key entry times that of a value entry. With 1/sqrt(fan_in) weights alone
        |S'| would be far above |S|, and the recursion would remember only the last eviction. `calibrate`
        does the same on real keys.
        """
        nn.init.normal_(self.global_tokens)
        for linear in (self.query_map, self.key_map, self.value_map):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.scale_update_(config.init_ratio / (config.rank * REFERENCE_EVICT) ** 0.5)

    @torch.no_grad()
    def scale_update_(self, factor: float) -> None:
        """Multiplies S' (and S_0 before its norm) by `factor`, shared evenly by the key and the value map.

        Of whitened maps P takes it: M keeps a scale at which the optimizer's steps are small relative to it.
        """
        maps = (self.key_map.weight, self.value_map.weight)
        for weight in maps if self.key_whitener is None else (self.key_whitener, self.value_whitener):
            weight.mul_(factor**0.5)

    def _apply(self, fn, recurse: bool = True):
        """`.to`, `.half` and the like call this: whiteners follow to a device and to float64, not to half.

        PEFT takes care of an adapter's parameters only, and a whitener rounded once stays rounded.
        """
        whole = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in whole.items():
            after = self.get_buffer(name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(self, name, before.to(after.device))
        return self

    def whiteners_as_parameters(self) -> None:
        """Frozen parameters instead of buffers, for an engine that cannot load buffers."""
        for name, whitener in list(self.named_buffers(recurse=False)):  # none without whitening
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(whitener, requires_grad=False))

    @torch.no_grad()
    def set_whiteners_(self, keys: Tensor, values: Tensor) -> None:
        """P of the keys and of the values, both (kv heads, head_dim, head_dim)."""
        self.key_whitener.copy_(keys)
        self.value_whitener.copy_(values)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        # The map's weights may be bfloat16 (a whole model cast for ZeRO-3): their product is then computed in float32.
        weight = linear.weight
        return (
            linear(self._wide(x).to(weight.dtype))
            if weight.dtype.itemsize >= 4
            else self._wide(linear(x.to(weight.dtype)))
        )

    def latents(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(…, d_kv) keys and values as they lie in the cache -> their (…, r) latents, W_K^a K and W_V^a V."""
        with without_autocast(keys.device):
            keys, values = self._whiten(keys, self.key_whitener), self._whiten(values, self.value_whitener)
            return self._project(self.key_map, keys), self._project(self.value_map, values)

    def _whiten(self, x: Tensor, whitener: Tensor | None) -> Tensor:
        if whitener is None:
            return x
        heads = self._wide(x).unflatten(-1, whitener.shape[:2])
        return torch.einsum("...hi,hij->...hj", heads, whitener.to(heads.dtype)).flatten(-2)

    def queries(self, global_queries: Tensor) -> Tensor:
        """(n_g, d_q) -> (n_g, r), W_Q^a q_g."""
        with without_autocast(global_queries.device):
            return self._project(self.query_map, global_queries)

    def update(self, queries: Tensor, key_latents: Tensor, value_latents: Tensor) -> Tensor:
        """S' of tokens that leave together.

        Args:
            queries: (n_g, r).
            key_latents, value_latents: (…, m, r) of m evicted tokens.

        Returns:
            (…, n_g, r).
        """
        with without_autocast(queries.device):
            return self.update_of(queries, key_latents.transpose(-2, -1) @ value_latents)

    @staticmethod
    def update_of(queries: Tensor, products: Tensor) -> Tensor:
        """S' of the (…, r, r) products K^T V of the latents."""
        with without_autocast(queries.device):
            return queries @ products

    def forward(self, project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Global queries W_Q^a q_g and the accumulator before any eviction, both (n_g, r).

        A module call and the only place that reads the global tokens, so that an engine that shards weights has
        gathered them.

        Args:
            project: the layer's own projections, (n_g, d_model) -> q_g (n_g, d_q), k_g and v_g (n_g, d_kv).
        """
        global_queries, keys, values = project(self.global_tokens)
        queries = self.queries(global_queries)
        update = self.update(queries, *self.latents(keys, values))
        if not self.use_global_tokens:
            # Zero, but with a gradient for every weight where no eviction follows: engines that shard expect one.
            return queries, 0 * update
        return queries, root_mean_square(update, self.normalisation)

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        """The accumulator after an eviction that contributes S' = `update`, both (…, n_g, r)."""
        accumulator = accumulator + update
        return accumulator if self.state_update == "sum" else root_mean_square(accumulator, self.normalisation)

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        """The accumulators after every eviction, from all S' at once: `advance` one after another.

        Args:
            accumulator: (n_g, r) or (batch, n_g, r), before the first.
            updates: (batch, J, n_g, r).

        Returns:
            (batch, J, n_g, r).
        """
        if self.state_update == "sum":
            return accumulator.unsqueeze(-3) + updates.cumsum(1)
        return recursion(accumulator, updates, self.normalisation)

    def state(self, accumulator: Tensor) -> Tensor:
        """S of an accumulator, (…, n_g, r) -> the same shape."""
        return root_mean_square(accumulator, self.normalisation) if self.state_update == "sum" else accumulator
