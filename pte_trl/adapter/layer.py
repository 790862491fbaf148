"""The adapted linears, which add x A S B, and the S that a decoder layer uses in the forward under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.routed import routed
from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.precision import without_autocast


@dataclass
class StateInUse:
    """The states a decoder layer uses in the forward under way, set by its attention, read by its linears.

    It is empty before and after: attention sets it, also when gradient checkpointing runs the layer again, and it is
    emptied after the last reader (`PteAttention.empty_after`). A copy or a pickle of it is empty too.

    Attributes:
        first: S, (n_g, r) or (batch, n_g, r), of every token that `plan` does not name.
        later: S_1 .. S_J, (batch, J, n_g, r), of the tokens in `plan.users`.
        run: tokens of each state where `first` is (batch, J, n_g, r): in a row, the last state perhaps with fewer.
        lead: with `run`, tokens that the first state has fewer.
        off: whether adapted linears are the base model's for now.
    """

    first: Tensor | None = None
    later: Tensor | None = None
    plan: ReplayPlan | None = None
    run: int | None = None
    lead: int = 0
    off: bool = False

    def set(self, first: Tensor, later: Tensor | None = None, plan: ReplayPlan | None = None) -> None:
        self.first, self.later, self.plan, self.run, self.lead = first, later, plan, None, 0

    def set_runs(self, states: Tensor, run: int, lead: int) -> None:
        self.first, self.later, self.plan, self.run, self.lead = states, None, None, run, lead

    def empty(self, *_) -> None:
        """Also as a forward hook, whatever it is called with."""
        self.first = self.later = self.plan = self.run = None
        self.lead = 0

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Inside, the layer's adapted linears are the base model's; whatever the state in use, it stays."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

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
            if self.run is not None:
                short = self.first.shape[1] * self.run - self.lead - x.shape[1]
                runs = nn.functional.pad(x, (0, 0, self.lead, short)).unflatten(1, (-1, self.run))
                return (runs @ side(self.first)).flatten(1, 2)[:, self.lead : self.lead + x.shape[1]]
            if self.later is None:
                return x @ side(self.first)
            return routed(x, side(self.first), side(self.later), self.plan)


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

    Args:
        width: how many of the linear's features are adapted, from the first on: of a linear that makes queries, keys
            and values the queries; None for all.
    """

    adapter_layer_names = ("pte_down", "pte_up")
    other_param_names = ("dropout", "scale", "read")

    def __init__(self, base_layer: nn.Linear, in_use: StateInUse, width: int | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.in_use = in_use
        self.width = width or base_layer.out_features
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
        self.pte_up[adapter_name] = nn.Linear(outer, self.width, bias=False)
        nn.init.zeros_(self.pte_up[adapter_name].weight)
        self.dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scale[adapter_name] = config.alpha / config.rank
        self.read[adapter_name] = config.read
        self._place(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.in_use.off:
            return result
        for name in self.active_adapters:
            if name in self.pte_down:
                down, up = self.pte_down[name], self.pte_up[name]
                inner = down(self.dropout[name](x.to(down.weight.dtype)))
                outer = self.in_use.apply(inner, self.read[name])
                outer = up(outer.to(up.weight.dtype))
                if self.scale[name] != 1.0:  # a pass over the output that decoding can do without
                    outer = self.scale[name] * outer
                if self.width != self.base_layer.out_features:
                    outer = nn.functional.pad(outer, (0, self.base_layer.out_features - self.width))
                result = result + outer.to(result.dtype)
        return result
