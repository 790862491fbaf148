"""The encoder of evicted thoughts (eq. 4): global tokens, the maps W^a, the state S and its norm.

    S_0 = Norm((W_Q^a q_g) (W_K^a k_g)^T (W_V^a v_g))        before any eviction
    S'  =      (W_Q^a q_g) (W_K^a K_e)^T (W_V^a V_e)         at an eviction

There is no softmax: it is linear attention from the global queries to the evicted tokens. What becomes of S' is the
choice of `state_update` (`pte_trl.adapter.updates`). What an eviction leaves behind is the *accumulator*, a matrix of
every sample; `state` turns it into S, which the adapted layers use.

These options change what is encoded of an evicted token:

    centre        k <- k - mean k, v <- v - mean v           means of every kv head, from calibration, never trained
    whiten        k <- k P_K, v <- v P_V                     of global tokens too; W^a is learned on top
    write_gate    v <- 2 sigmoid(w_K rms(k) + w_V rms(v) + b) v      rms: divided by the root of the mean square

The write gate reads keys and values as they are after the other two, not their latents: these are small at the start
(`init_ratio`) and forget what the maps leave out. Their entries are of size 1 for it, however long a model's keys are,
so that a step of the optimizer changes the gate alike. w and b start at zero, which is a factor of 1.

    state_per_head  every kv head has latents and a state of its own (`updates`), of global tokens too

The maps have as many weights with it. A head's latents are its own columns of W^a times its keys; without the option
they are added up over the heads.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from pte_trl.adapter.recursion import NORM_EPS, root_mean_square
from pte_trl.adapter.updates import UPDATES, wide
from pte_trl.replay.precision import without_autocast

WHITENERS = ("key_whitener", "value_whitener")
CENTRES = ("key_centre", "value_centre")
FITTED = WHITENERS + CENTRES  # by calibration; in float32, saved with the adapter, never trained
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
        self.normalisation = config.normalisation
        self.use_global_tokens = config.use_global_tokens
        self.global_tokens = nn.Parameter(torch.empty(config.num_global_tokens, hidden_size))
        self.query_map = nn.Linear(query_size, config.rank, bias=False)
        self.heads = keys[0] if config.state_per_head else 1
        if config.num_global_tokens % self.heads or (self.heads > 1 and values[0] != keys[0]):
            raise ValueError(
                f"num_global_tokens={config.num_global_tokens}: with state_per_head it must be a multiple of the "
                f"{keys[0]} heads of keys, and there must be as many of values, of which there are {values[0]}"
            )
        self.key_map, self.value_map = (Map(math.prod(x), config.rank, self.heads) for x in (keys, values))
        # P of W^a = M P, (kv heads, head_dim, head_dim): saved with the adapter, never trained.
        for name, (heads, width) in zip(WHITENERS, (keys, values), strict=True):
            eye = torch.eye(width, dtype=torch.float32).repeat(heads, 1, 1)
            self.register_buffer(name, eye if config.whiten else None)
        for name, shape in zip(CENTRES, (keys, values), strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32) if config.centre else None)
        self.write_gate = WriteGate(math.prod(keys), math.prod(values)) if config.write_gate else None
        self.rule = UPDATES[config.state_update](config, self.heads)
        self.reset_parameters(config)

    @torch.no_grad()
    def reset_parameters(self, config) -> None:
        """Scales such that |S'| of one eviction is `config.init_ratio` of |S|, for inputs of unit variance.

        An entry of S' of m evicted tokens sums r * m products of three unit normals: its deviation is
        sqrt(r * m) times that of a key entry times that of a value entry. With 1/sqrt(fan_in) weights alone
        |S'| would be far above |S|, and the recursion would remember only the last eviction. Key latents of
        unit length make it sqrt(m), times the rate of the delta rule. `calibrate` does the same on real keys.
        """
        nn.init.normal_(self.global_tokens)
        for linear, heads in ((self.query_map, 1), (self.key_map, self.heads), (self.value_map, self.heads)):
            nn.init.normal_(linear.weight, std=(linear.in_features / heads) ** -0.5)
        size = (REFERENCE_EVICT * (0.25 if self.rule.unit_keys else config.rank)) ** 0.5
        self.scale_update_(config.init_ratio / size)

    @torch.no_grad()
    def scale_update_(self, factor: float) -> None:
        """Multiplies S' (and S_0 before its norm) by `factor`, shared evenly by the key and the value map.

        Where keys are taken at unit length, the value map has all of it. Of whitened maps P takes it: M keeps a scale
        at which the optimizer's steps are small relative to it.
        """
        maps = (self.key_map.weight, self.value_map.weight)
        maps = maps if self.key_whitener is None else (self.key_whitener, self.value_whitener)
        if self.rule.unit_keys:
            maps[1].mul_(factor)
            return
        for weight in maps:
            weight.mul_(factor**0.5)

    def _apply(self, fn, recurse: bool = True):
        """`.to`, `.half` and the like call this: what is fitted follows to a device and to float64, not to half.

        PEFT takes care of an adapter's parameters only, and a whitener rounded once stays rounded.
        """
        whole = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in whole.items():
            after = self.get_buffer(name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(self, name, before.to(after.device))
        return self

    def fitted_as_parameters(self) -> None:
        """Frozen parameters instead of buffers, for an engine that cannot load buffers."""
        for name, tensor in list(self.named_buffers(recurse=False)):  # a buffer that is None is not among them
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @torch.no_grad()
    def set_whiteners_(self, keys: Tensor, values: Tensor) -> None:
        """P of the keys and of the values, both (kv heads, head_dim, head_dim)."""
        self.key_whitener.copy_(keys)
        self.value_whitener.copy_(values)

    @torch.no_grad()
    def set_centres_(self, keys: Tensor, values: Tensor) -> None:
        """Mean keys and values of every head, (kv heads, head_dim) both."""
        self.key_centre.copy_(keys)
        self.value_centre.copy_(values)

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        # The map's weights may be bfloat16 (a whole model cast for ZeRO-3): their product is then computed in float32.
        weight = linear.weight
        return linear(wide(x).to(weight.dtype)) if weight.dtype.itemsize >= 4 else wide(linear(x.to(weight.dtype)))

    def latents(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(…, d_kv) keys and values of evicted tokens, as they lie in the cache -> their (…, H r) latents.

        W_K^a K and W_V^a V, the options of this encoder included.
        """
        with without_autocast(keys.device):
            keys, values = self._centred(keys, self.key_centre), self._centred(values, self.value_centre)
            keys, values = self._whiten(keys, self.key_whitener), self._whiten(values, self.value_whitener)
            found = self._project(self.key_map, keys), self._project(self.value_map, values)
            return found if self.write_gate is None else (found[0], self.write_gate(keys, values) * found[1])

    def _centred(self, x: Tensor, centre: Tensor | None) -> Tensor:
        """Entries of zeros stay zeros. They stand for none, where heads or samples evict different tokens."""
        if centre is None:
            return x
        heads = wide(x).unflatten(-1, centre.shape)
        return (heads - centre.to(heads.dtype) * (heads != 0).any(-1, keepdim=True)).flatten(-2)

    def _whiten(self, x: Tensor, whitener: Tensor | None) -> Tensor:
        if whitener is None:
            return x
        heads = wide(x).unflatten(-1, whitener.shape[:2])
        return torch.einsum("...hi,hij->...hj", heads, whitener.to(heads.dtype)).flatten(-2)

    def queries(self, global_queries: Tensor) -> Tensor:
        """(n_g, d_q) -> (n_g, r), W_Q^a q_g."""
        with without_autocast(global_queries.device):
            return self._project(self.query_map, global_queries)

    def update(self, queries: Tensor, key_latents: Tensor, value_latents: Tensor) -> Tensor:
        """What the accumulator needs to know of tokens that leave together: S', if the rule is additive.

        Args:
            queries: (n_g, r).
            key_latents, value_latents: (…, m, H r) of m evicted tokens; H is 1 but for `state_per_head`.

        Returns:
            (…, n_g, r); as the rule has it.
        """
        with without_autocast(queries.device):
            return self.rule.update(queries, key_latents, value_latents)

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
        with without_autocast(queries.device):
            keys, values = self._whiten(keys, self.key_whitener), self._whiten(values, self.value_whitener)
            keys, values = self._project(self.key_map, keys), self._project(self.value_map, values)
            update = self.rule.summed(queries, keys, values)
        # Times zero, for a gradient of every weight where no eviction follows: engines that shard expect one.
        gates = [gate for gate in (self.rule, self.write_gate) if gate is not None]
        for weight in (weight for gate in gates for weight in gate.parameters()):
            update = update + 0 * weight.sum()
        state = root_mean_square(update, self.normalisation) if self.use_global_tokens else 0 * update
        return queries, self.rule.first(state)

    def written(self, update: Tensor) -> Tensor:
        """S' of an `update`, (…, n_g, r)."""
        return self.rule.written(update)

    def advance(self, accumulator: Tensor, update: Tensor) -> Tensor:
        """The accumulator after an eviction that contributes `update`."""
        with without_autocast(update.device):
            return self.rule.advance(accumulator, update)

    def advance_all(self, accumulator: Tensor, updates: Tensor) -> Tensor:
        """The accumulators after every eviction, from all updates at once: `advance` one after another.

        Args:
            accumulator: (n, r) or (batch, n, r), before the first; n = n_g, but for the delta rule.
            updates: (batch, J, …).

        Returns:
            (batch, J, n, r).
        """
        with without_autocast(updates.device):
            return self.rule.advance_all(accumulator, updates)

    def state(self, accumulator: Tensor) -> Tensor:
        """S of an accumulator, (…, n_g, r)."""
        return self.rule.state(accumulator)


class Map(nn.Linear):
    """W^a: latents of keys or values, (…, width) -> (…, r); of every head apart, (…, heads * r).

    A module call even where heads are apart, for engines that gather weights at one.
    """

    def __init__(self, width: int, rank: int, heads: int):
        super().__init__(width, rank, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        if self.heads == 1:
            return super().forward(x)
        # A product per head: (heads, tokens, width of one) times (heads, width of one, r).
        parts = x.unflatten(-1, (self.heads, -1)).movedim(-2, 0).flatten(1, -2)
        by = self.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        return (parts @ by).transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])


class WriteGate(nn.Module):
    """How much of an evicted token is written: 2 sigmoid(w_K rms(k) + w_V rms(v) + b).

    Args:
        keys, values: widths of all heads together.
    """

    def __init__(self, keys: int, values: int):
        super().__init__()
        self.key_weight = nn.Parameter(torch.zeros(keys))
        self.value_weight = nn.Parameter(torch.zeros(values))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """(…, d_kv) keys and values -> (…, 1)."""
        total = wide(self.offset)
        for x, weight in ((wide(keys), self.key_weight), (wide(values), self.value_weight)):
            total = total + rms_norm(x, x.shape[-1:], eps=NORM_EPS) @ weight.to(x.dtype)
        return 2 * total.sigmoid().unsqueeze(-1)
