"""The adapted layers: linears that add x A S B, and the attention module that knows which S every token uses."""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.encoder import WHITENERS, Encoder, without_autocast
from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.replay.plan import ReplayPlan


@dataclass
class StateInUse:
    """The states a decoder layer uses in the forward under way, set by its attention, read by its linears.

    It is empty before and after: attention sets it, also when gradient checkpointing runs the layer again, and what
    runs last in the layer, its MLP, empties it (`PteAttention.empty_after`). A copy or a pickle of it is empty too.

    Attributes:
        first: S, (n_g, r) or (batch, n_g, r), of every token that `plan` does not name.
        later: S_1 .. S_J, (batch, J, n_g, r), of the tokens in `plan.users`.
    """

    first: Tensor | None = None
    later: Tensor | None = None
    plan: ReplayPlan | None = None

    def set(self, first: Tensor, later: Tensor | None = None, plan: ReplayPlan | None = None) -> None:
        self.first, self.later, self.plan = first, later, plan

    def empty(self, *_) -> None:
        """Also as a forward hook, whatever it is called with."""
        self.first = self.later = self.plan = None

    def __reduce__(self):
        return StateInUse, ()

    def apply(self, x: Tensor, read: str) -> Tensor:
        """x S (row reading, x: (batch, length, n_g)) or S x (column reading, x: (batch, length, r))."""
        side = (lambda s: s) if read == "row" else (lambda s: s.transpose(-2, -1))
        if self.first is None:
            raise RuntimeError("a PTE linear was called outside of its decoder layer's forward, where S is known")
        # Decode, replay and segments must round alike, whatever autocast would choose for these small products.
        with without_autocast(x.device):
            x = x.to(self.first.dtype)
            y = x @ side(self.first)
            if self.later is None:
                return y
            # A replay computes all tokens under S_0 and overwrites those that were decoded after an eviction.
            return self.plan.put(y, self.plan.users, self.plan.pick(x, self.plan.users) @ side(self.later))


class PteLayer(BaseTunerLayer):
    """What both kinds of layer do with the modules of an adapter."""

    def frozen_weight(self) -> Tensor:
        """A weight of the base model, on whose device and in whose dtype a fresh adapter is made."""
        raise NotImplementedError

    def _place(self, adapter_name: str) -> None:
        """Moves a fresh adapter to the base's device and dtype; PEFT widens it from there if asked to."""
        weight = self.frozen_weight()
        for container in self.adapter_layer_names:
            module = getattr(self, container)[adapter_name]
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(weight.device, weight.dtype)
        self.train(self.base_layer.training)  # new modules are in training mode

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # PEFT asks once an adapter is loaded with `low_cpu_mem_usage`. With a dtype it would round it to the base's.
        return self.frozen_weight().device, None


class PteLinear(nn.Module, PteLayer):
    """y = W x + s * up(S^T down(x)), the row reading; up(S down(x)) for the column reading.

    `down` is random and `up` zero at the start, so that the untrained adapter is exactly the base model.
    """

    adapter_layer_names = ("pte_down", "pte_up")
    other_param_names = ("dropout", "scale", "read")

    def __init__(self, base_layer: nn.Linear, in_use: StateInUse):
        super().__init__()
        self.base_layer = base_layer
        self.in_use = in_use
        self.pte_down = nn.ModuleDict()
        self.pte_up = nn.ModuleDict()
        self.dropout, self.scale, self.read = nn.ModuleDict(), {}, {}
        self.merged_adapters = []

    def frozen_weight(self) -> Tensor:
        return self.base_layer.weight

    def update_layer(self, adapter_name: str, config: PteConfig, inference_mode: bool = False) -> None:
        inner, outer = config.num_global_tokens, config.rank
        if config.read == "column":
            inner, outer = outer, inner
        self.pte_down[adapter_name] = nn.Linear(self.base_layer.in_features, inner, bias=False)
        self.pte_up[adapter_name] = nn.Linear(outer, self.base_layer.out_features, bias=False)
        nn.init.zeros_(self.pte_up[adapter_name].weight)
        self.dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scale[adapter_name] = config.alpha / config.rank
        self.read[adapter_name] = config.read
        self._place(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.pte_down:
                down, up = self.pte_down[name], self.pte_up[name]
                inner = down(self.dropout[name](x.to(down.weight.dtype)))
                outer = self.in_use.apply(inner, self.read[name])
                outer = up(outer.to(up.weight.dtype))
                if self.scale[name] != 1.0:  # a pass over the output that decoding can do without
                    outer = self.scale[name] * outer
                result = result + outer.to(result.dtype)
        return result


def frozen(linear: nn.Module) -> nn.Linear:
    """The base model's own linear layer, adapted or not."""
    return linear.base_layer if isinstance(linear, PteLinear) else linear


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding as all supported families apply it, bit for bit (tests/test_compat.py compares them).

    Args:
        x: (batch, length, heads, head_dim).
        cos, sin: (batch, length, head_dim).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)


class PteAttention(nn.Module, PteLayer):
    """Finds the state that every token must use, then runs the layer's own attention unchanged.

    Decoding takes it from the cache, after the eviction due before these tokens; a replay computes S_1 .. S_J from
    the layer's own keys and values; a forward with neither uses S_0 throughout.
    """

    adapter_layer_names = ("pte_encoder",)
    other_param_names = ("config",)

    def __init__(self, base_layer: nn.Module, in_use: StateInUse):
        super().__init__()
        self.base_layer = base_layer
        self.in_use = in_use
        self.pte_encoder = nn.ModuleDict()
        self.config = {}
        self.update_ratio: Tensor | None = None
        self.watch_updates = False
        self.merged_adapters = []
        self._emptied_by = None

    def update_layer(self, adapter_name: str, config: PteConfig, inference_mode: bool = False) -> None:
        query, key = frozen(self.base_layer.q_proj), frozen(self.base_layer.k_proj)
        sizes = (query.in_features, query.out_features, key.out_features)
        self.pte_encoder[adapter_name] = Encoder(*sizes, config, self.base_layer.head_dim)
        self.config[adapter_name] = config
        self._place(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def frozen_weight(self) -> Tensor:
        return frozen(self.base_layer.q_proj).weight

    def empty_after(self, mlp: nn.Module) -> None:
        """Empties the state in use after every forward of `mlp`, the layer's last reader, also after a failed one."""
        self._emptied_by = mlp.register_forward_hook(self.in_use.empty, always_call=True)

    def set_adapter(self, *args, **kwargs) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze_whiteners()

    def set_requires_grad(self, *args, **kwargs) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze_whiteners()

    def _freeze_whiteners(self) -> None:
        """PEFT makes every parameter of an adapter trainable, and whiteners may be parameters (see `Encoder`)."""
        for encoder in self.pte_encoder.values():
            for name, parameter in encoder.named_parameters():
                if name in WHITENERS and parameter.is_leaf:
                    parameter.requires_grad_(False)

    def unload_and_optionally_merge_module(self, merge: bool, **kwargs) -> nn.Module:
        for name, child in list(self.base_layer.named_children()):
            if isinstance(child, PteLinear):
                setattr(self.base_layer, name, frozen(child))
        self._emptied_by.remove()
        return self.base_layer

    def forward(self, hidden_states: Tensor, *args, replay: ReplayPlan | None = None, **kwargs):
        try:
            name = self._adapter()
            if name is not None:
                self._find_state(name, hidden_states, replay, **kwargs)
            return self.base_layer(hidden_states, *args, replay=replay, **kwargs)
        except BaseException:
            self.in_use.empty()
            raise

    def _find_state(
        self, name: str, hidden: Tensor, replay: ReplayPlan | None, past_key_values=None, **kwargs
    ) -> None:
        if replay is not None:
            self._replay_states(name, hidden, kwargs["position_embeddings"], replay)
        elif isinstance(past_key_values, BoundedCache):
            self._decode_state(name, past_key_values.layer(self.base_layer.layer_idx), hidden.shape[1])
        else:
            _, accumulator = self._start(name)
            self.in_use.set(self.pte_encoder[name].state(accumulator))

    def _adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.pte_encoder]
        if len(names) > 1:
            raise ValueError(f"active adapters {names}: one PTE adapter can be active at a time, S belongs to it")
        return names[0] if names else None

    def _adapts(self, name: str, linear: str) -> bool:
        """Whether the adapter changes this projection of this layer."""
        module = getattr(self.base_layer, linear)
        return isinstance(module, PteLinear) and name in module.pte_down

    def _start(self, name: str) -> tuple[Tensor, Tensor]:
        """Global queries (n_g, r) and the accumulator before any eviction, by the layer's own frozen projections."""
        # Frozen: through an adapted projection S would depend on itself.
        attention = self.base_layer

        def project(tokens: Tensor, linear: str, norm: str | None = None) -> Tensor:
            module = frozen(getattr(attention, linear))
            out = module(tokens.to(module.weight.dtype))
            if norm is not None and hasattr(attention, norm):
                out = getattr(attention, norm)(out.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
            return out

        names = (("q_proj", "q_norm"), ("k_proj", "k_norm"), ("v_proj", None))
        return self.pte_encoder[name](lambda tokens: tuple(project(tokens, *each) for each in names))

    def encode(self, name: str, keys: Tensor, values: Tensor, queries: Tensor, accumulator: Tensor) -> Tensor:
        """The accumulator after one eviction.

        Args:
            name: the adapter; one whose config has `encode_evicted`.
            keys, values: (batch, kv heads, m, head_dim) of the tokens that leave, as the cache holds them.
            queries, accumulator: (n_g, r) from the start, and (n_g, r) or (batch, n_g, r) before the eviction.

        Returns:
            (batch, n_g, r).
        """
        encoder = self.pte_encoder[name]
        keys, values = (x.transpose(1, 2).flatten(2) for x in (keys, values))
        update = encoder.update(queries, *encoder.latents(keys, values))
        if torch.is_grad_enabled():
            self._watch(update, accumulator)
        return encoder.advance(accumulator, update)

    def _decode_state(self, name: str, layer: BoundedLayer, length: int) -> None:
        if layer.accumulator is None:  # the prompt; what follows from the weights alone is computed once a sequence
            layer.queries, layer.accumulator = self._start(name)
            layer.owner = name
        elif layer.owner != name:
            raise ValueError(f"this cache holds the state of adapter {layer.owner!r}, but {name!r} is active now")

        def encode(keys: Tensor, values: Tensor) -> None:
            layer.accumulator = self.encode(name, keys, values, layer.queries, layer.accumulator)

        # The eviction comes before these tokens are fed, so they are the first to be decoded under the new S.
        layer.make_room(length, encode if self.config[name].encode_evicted else None)
        self.in_use.set(self.pte_encoder[name].state(layer.accumulator))

    def _keys_values(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache would hold them, (batch, length, d_kv), under the state in use."""
        attention = self.base_layer
        keys = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        return rotate(keys, *position_embeddings).flatten(2), attention.v_proj(hidden)

    def _replay_states(self, name: str, hidden: Tensor, rotary: tuple[Tensor, Tensor], plan: ReplayPlan) -> None:
        encoder, config = self.pte_encoder[name], self.config[name]
        queries, accumulator = self._start(name)
        self.in_use.set(encoder.state(accumulator))
        if plan.count == 0 or not config.encode_evicted:
            return
        # Latents of every token, though only evicted ones are used: one large product instead of J small ones.
        latents = encoder.latents(*self._keys_values(hidden, rotary))
        # Where keys or values are adapted, those of later tokens depend on S, which depends on those of earlier ones.
        if self._adapts(name, "k_proj") or self._adapts(name, "v_proj"):
            accumulators = self._walk(encoder, hidden, rotary, plan, queries, accumulator, latents)
        else:
            updates = encoder.update(queries, *(plan.pick(x, plan.evicted) for x in latents))
            self._watch(updates, accumulator)
            accumulators = self._accumulate(encoder, accumulator, updates)
        self.in_use.set(encoder.state(accumulator), encoder.state(accumulators), plan)

    @staticmethod
    def _accumulate(encoder: Encoder, accumulator: Tensor, updates: Tensor) -> Tensor:
        """(batch, J, n_g, r) accumulators after every eviction, from all S' at once."""
        if encoder.state_update == "sum":
            return accumulator + updates.cumsum(1)
        accumulators = []
        for update in updates.unbind(1):
            accumulator = encoder.advance(accumulator, update)
            accumulators.append(accumulator)
        return torch.stack(accumulators, dim=1)

    def _walk(self, encoder, hidden, rotary, plan: ReplayPlan, queries, accumulator, latents) -> Tensor:
        """The same when keys and values depend on S themselves: eviction by eviction, as they were decoded."""
        cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rotary)
        accumulators, updates = [], []
        for k in range(plan.count):
            updates.append(encoder.update(queries, *(plan.pick(x, plan.evicted[:, k]) for x in latents)))
            accumulator = encoder.advance(accumulator, updates[-1])
            accumulators.append(accumulator)
            self.in_use.set(encoder.state(accumulator))
            # The tokens that were decoded under this S get their keys and values anew, before an eviction takes them.
            users = plan.users[:, k]
            new = self._keys_values(plan.pick(hidden, users), (plan.pick(cos, users), plan.pick(sin, users)))
            latents = [plan.put(old, users, rows) for old, rows in zip(latents, encoder.latents(*new), strict=True)]
        self._watch(torch.stack(updates, dim=1), accumulators[0])
        return torch.stack(accumulators, dim=1)

    def _watch(self, updates: Tensor, accumulator: Tensor) -> None:
        """Keeps |S'| / |S| of this forward for the trainer's log (Frobenius norms; S after its norm)."""
        if self.watch_updates:
            with torch.no_grad():
                # By the norm of eq. 4 every entry of S has a mean square of 1.
                state_norm = accumulator.shape[-2:].numel() ** 0.5
                self.update_ratio = updates.norm(dim=(-2, -1)).mean() / state_norm
