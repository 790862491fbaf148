"""The attention module of an adapted decoder layer, which finds the state S that every token uses."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pte_trl.adapter import states
from pte_trl.adapter.arrival import Call, Given, Probe, arriving, zeros_from
from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.encoder import FITTED, Encoder
from pte_trl.adapter.layer import PteLayer, PteLinear, StateInUse
from pte_trl.adapter.placement import named, unwrapped
from pte_trl.adapter.projections import (
    as_encoded,
    heads_and_widths,
    hidden_width,
    only_for_keys_and_values,
    only_for_queries,
    queries_of,
    query_projection,
    query_width,
    rows,
)
from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.precision import without_autocast
from pte_trl.replay.segment_layers import SegmentLayer


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
        attention = self.base_layer
        sizes = (hidden_width(attention), query_width(attention), *heads_and_widths(attention))
        self.pte_encoder[adapter_name] = Encoder(*sizes, config)
        self.config[adapter_name] = config
        self._place(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def frozen_weight(self) -> Tensor:
        return query_projection(self.base_layer).weight

    def empty_after(self, mlp: nn.Module) -> None:
        """Empties the state in use after every forward of `mlp`, the layer's last reader, also after a failed one.

        Where no linear of an MLP is adapted, the state is emptied as soon as the attention is done.
        """
        if self._emptied_by is None:
            self._emptied_by = mlp.register_forward_hook(self.in_use.empty, always_call=True)

    def set_adapter(self, *args, **kwargs) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze_fitted()

    def set_requires_grad(self, *args, **kwargs) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze_fitted()

    def _freeze_fitted(self) -> None:
        """PEFT makes every parameter of an adapter trainable, and what is fitted may be parameters (see `Encoder`)."""
        for encoder in self.pte_encoder.values():
            for name, parameter in encoder.named_parameters():
                if name in FITTED and parameter.is_leaf:
                    parameter.requires_grad_(False)

    def unload_and_optionally_merge_module(self, merge: bool, **kwargs) -> nn.Module:
        for name, child in list(self.base_layer.named_children()):
            if isinstance(child, PteLinear):
                setattr(self.base_layer, name, unwrapped(child))
        if self._emptied_by is not None:
            self._emptied_by.remove()
        return self.base_layer

    def forward(self, hidden_states: Tensor, *args, replay: ReplayPlan | None = None, **kwargs):
        if replay is not None:
            kwargs["replay"] = replay
        name = self._adapter()
        if name is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        try:
            call = Call.of(self.base_layer, (hidden_states, *args), kwargs)
            in_place = self._find_state(name, hidden_states, call, replay)
            if in_place is not None:
                call = Call({**call.arguments, "past_key_values": in_place})
            known = only_for_keys_and_values(self.base_layer) if isinstance(in_place, Given) else []
            with zeros_from(known):
                out = self.base_layer(hidden_states, **call.arguments)
            if self._emptied_by is None:
                self.in_use.empty()
            return out
        except BaseException:
            self.in_use.empty()
            raise

    def _find_state(self, name: str, hidden: Tensor, call: Call, replay: ReplayPlan | None) -> Probe | None:
        """Sets the state; returns what to hand to the attention as its cache, None for what it was called with."""
        cache = call.arguments.get("past_key_values")
        if replay is not None:
            return states.of_replay(self, name, hidden, call, replay)
        if isinstance(cache, BoundedCache):
            self._decode_state(name, cache.layer(self.base_layer.layer_idx), hidden, call)
        else:
            _, accumulator = self.start(name, call)
            self.in_use.set(self.pte_encoder[name].state(accumulator))
        return None

    def _adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.pte_encoder]
        if len(names) > 1:
            raise ValueError(f"active adapters {names}: one PTE adapter can be active at a time, S belongs to it")
        return names[0] if names else None

    def adapts(self, name: str, linear: str) -> bool:
        """Whether the adapter changes this projection of this layer; `linear` as in `target_modules`."""
        found = named(self.base_layer, linear)
        module = None if found is None else getattr(self.base_layer, found)
        return isinstance(module, PteLinear) and name in module.pte_down

    @property
    def keys_follow_state(self) -> bool:
        """Whether a token's keys or values depend on S, so that S has to be found eviction by eviction."""
        name = self._adapter()
        if name is None or not self.config[name].encode_evicted:
            return False
        return self.adapts(name, "k_proj") or self.adapts(name, "v_proj")

    def start(self, name: str, call: Call) -> tuple[Tensor, Tensor]:
        """Global queries (n_g, r) and the accumulator before any eviction, by the layer's own frozen projections."""

        def project(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tokens = tokens.to(self.frozen_weight().dtype)
            # Frozen: through an adapted projection S would depend on itself.
            with self.in_use.unadapted():
                found = self._arriving(tokens.unsqueeze(0), call.without_position(len(tokens)))
            return queries_of(self.base_layer, tokens), *self._rows_of_first(*found)

        return self.pte_encoder[name](project)

    def start_and_arriving(self, name: str, hidden: Tensor, call: Call, plan: ReplayPlan) -> tuple[Tensor, ...]:
        """`start` and `arriving` in one forward, where neither keys nor values are adapted.

        Returns:
            Global queries, the accumulator, keys and values.
        """
        length, arrived = hidden.shape[1], []

        def project(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tokens = tokens.to(self.frozen_weight().dtype)
            # Each row is its own tokens, then the global tokens. A token's keys and values do not depend on others.
            with without_autocast(hidden.device):
                both = torch.cat([hidden, tokens.to(hidden.dtype).expand(len(hidden), -1, -1)], dim=1)
            found = self.arriving(both, call.followed_by_unrotated(len(tokens), plan))
            # Not slices: the gradient of a split is one concatenation.
            (keys, global_keys), (values, global_values) = (x.split((length, len(tokens)), dim=2) for x in found)
            arrived.extend((keys, values))
            return queries_of(self.base_layer, tokens), *self._rows_of_first(global_keys, global_values)

        return *self.pte_encoder[name](project), *arrived

    def _rows_of_first(self, keys: Tensor, values: Tensor) -> Iterator[Tensor]:
        """(batch, heads, length, width) as a cache holds them -> (length, heads * width) of the first sample."""
        return (rows(x)[0] for x in as_encoded(self.base_layer, keys[:1], values[:1]))

    def arriving(self, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache would get them, (batch, kv heads, length, width), under the state in use."""
        # Where neither is adapted, an adapted linear may be run for them that makes queries as well.
        with nullcontext() if self.keys_follow_state else self.in_use.unadapted():
            return self._arriving(hidden, call)

    def _arriving(self, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return arriving(self.base_layer, hidden, call, unused=only_for_queries(self.base_layer))

    def latents(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, kv heads, length, width) keys and values as the cache holds them -> (batch, length, H r) latents."""
        keys, values = as_encoded(self.base_layer, keys, values)
        return self.pte_encoder[name].latents(rows(keys), rows(values))

    def encode(self, name: str, keys: Tensor, values: Tensor, queries: Tensor, accumulator: Tensor) -> Tensor:
        """The accumulator after one eviction.

        Args:
            name: the adapter; one whose config has `encode_evicted`.
            keys, values: (batch, kv heads, m, width) of the tokens that leave, as the cache holds them.
            queries, accumulator: (n_g, r) from the start, and (n, r) or (batch, n, r) before the eviction; n is n_g,
                but for the delta rule.

        Returns:
            (batch, n, r).
        """
        encoder = self.pte_encoder[name]
        update = encoder.update(queries, *self.latents(name, keys, values))
        if torch.is_grad_enabled():
            self.watch(name, update)
        return encoder.advance(accumulator, update)

    def _decode_state(self, name: str, layer: BoundedLayer, hidden: Tensor, call: Call) -> None:
        if layer.accumulator is None:  # the prompt; what follows from the weights alone is computed once a sequence
            layer.queries, layer.accumulator = self.start(name, call)
            layer.owner = name
        elif layer.owner != name:
            raise ValueError(f"this cache holds the state of adapter {layer.owner!r}, but {name!r} is active now")

        if isinstance(layer, SegmentLayer) and not layer.in_prompt() and self.config[name].encode_evicted:
            states.of_segment(self, name, layer, hidden, call)
            return

        def encode(keys: Tensor, values: Tensor) -> None:
            layer.accumulator = self.encode(name, keys, values, layer.queries, layer.accumulator)

        # The eviction comes before these tokens are fed, so they are the first to be decoded under the new S.
        layer.make_room(hidden.shape[1], encode if self.config[name].encode_evicted else None)
        self.in_use.set(self.pte_encoder[name].state(layer.accumulator))

    def watch(self, name: str, updates: Tensor) -> None:
        """Keeps |S'| / |S| of this forward for the trainer's log (Frobenius norms; S after its norm)."""
        if self.watch_updates:
            with torch.no_grad():
                written = self.pte_encoder[name].written(updates)
                # By the norm of eq. 4 every entry of S has a mean square of 1.
                self.update_ratio = written.norm(dim=(-2, -1)).mean() / written.shape[-2:].numel() ** 0.5
