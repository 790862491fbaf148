"""The attention module of an adapted decoder layer, which finds the state S that every token uses."""

import torch
from torch import Tensor, nn

from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.encoder import WHITENERS, Encoder
from pte_trl.adapter.layer import PteLayer, PteLinear, StateInUse, frozen
from pte_trl.adapter.routed import evicted_products
from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.segment_layers import SegmentLayer


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
            layer = past_key_values.layer(self.base_layer.layer_idx)
            self._decode_state(name, layer, hidden, kwargs.get("position_embeddings"))
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

    @property
    def keys_follow_state(self) -> bool:
        """Whether a token's keys or values depend on S, so that S has to be found eviction by eviction."""
        name = self._adapter()
        if name is None or not self.config[name].encode_evicted:
            return False
        return self._adapts(name, "k_proj") or self._adapts(name, "v_proj")

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

    def _decode_state(self, name: str, layer: BoundedLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        if layer.accumulator is None:  # the prompt; what follows from the weights alone is computed once a sequence
            layer.queries, layer.accumulator = self._start(name)
            layer.owner = name
        elif layer.owner != name:
            raise ValueError(f"this cache holds the state of adapter {layer.owner!r}, but {name!r} is active now")

        if isinstance(layer, SegmentLayer) and not layer.in_prompt() and self.config[name].encode_evicted:
            self._segment_states(name, layer, hidden, rotary)
            return

        def encode(keys: Tensor, values: Tensor) -> None:
            layer.accumulator = self.encode(name, keys, values, layer.queries, layer.accumulator)

        # The eviction comes before these tokens are fed, so they are the first to be decoded under the new S.
        layer.make_room(hidden.shape[1], encode if self.config[name].encode_evicted else None)
        self.in_use.set(self.pte_encoder[name].state(layer.accumulator))

    def _segment_states(self, name: str, layer: SegmentLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """The states of a segment of a replay, whose tokens may have several."""
        encoder, schedule, before, later = self.pte_encoder[name], layer.schedule, layer.accumulator, None
        evict, room = schedule.evict, schedule.room(layer.fed)
        old = schedule.evictions_before(layer.fed) == layer.evicted  # whether the first token still has the old state

        def encode(keys: Tensor, values: Tensor, count: int) -> None:
            nonlocal later
            own = count * evict - keys.shape[2]
            if own:
                keys, values = self._with_own(keys, values, hidden[:, :own], [x[:, :own] for x in rotary])
            if count == 1:
                later = self.encode(name, keys, values, layer.queries, before).unsqueeze(1)
            else:
                later = self._encode_runs(name, keys, values, evict, layer)
            layer.accumulator = later[:, -1]

        layer.make_room(hidden.shape[1], encode)
        if hidden.shape[1] <= room:
            self.in_use.set(encoder.state(layer.accumulator))
            return
        # E tokens in a row have the same state; of the first state there are `room`.
        states, runs = encoder.state(later), -(-room // evict)
        first = encoder.state(before).expand(len(hidden), -1, -1).unsqueeze(1) if old else states[:, :1]
        states = torch.cat([first.expand(-1, runs, -1, -1), states if old else states[:, 1:]], dim=1)
        self.in_use.set_runs(states, evict, runs * evict - room)

    def _with_own(self, keys: Tensor, values: Tensor, hidden: Tensor, rotary: list[Tensor]) -> tuple[Tensor, ...]:
        """Keys and values as the cache holds them, then those of a segment's first tokens, before it holds them.

        No projection of these is adapted (`keys_follow_state`), so no state has to be known.
        """
        new = (x.unflatten(-1, (-1, self.base_layer.head_dim)) for x in self._keys_values(hidden, rotary))
        return tuple(torch.cat([old, x.transpose(1, 2)], 2) for old, x in zip((keys, values), new, strict=True))

    def _encode_runs(self, name: str, keys: Tensor, values: Tensor, run: int, layer: BoundedLayer) -> Tensor:
        """(batch, J, n_g, r) accumulators after J evictions of `run` tokens; keys: (batch, kv heads, J run, …)."""
        encoder = self.pte_encoder[name]
        latents = encoder.latents(*(x.transpose(1, 2).flatten(2) for x in (keys, values)))
        updates = encoder.update(layer.queries, *(x.unflatten(1, (-1, run)) for x in latents))
        if torch.is_grad_enabled():
            self._watch(updates, layer.accumulator)
        return encoder.advance_all(layer.accumulator, updates)

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
        if self.keys_follow_state:
            accumulators = self._walk(encoder, hidden, rotary, plan, queries, accumulator, latents)
        else:
            updates = encoder.update_of(queries, evicted_products(*latents, plan))
            self._watch(updates, accumulator)
            accumulators = encoder.advance_all(accumulator, updates)
        self.in_use.set(encoder.state(accumulator), encoder.state(accumulators), plan)

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
