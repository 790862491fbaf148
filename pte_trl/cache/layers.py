"""One cache layer for every layer of a model: what each type of layer keeps of the past.

Only full attention is bounded by a `Schedule`. A sliding layer has a window of its own, and a recurrent layer (linear
attention, state space, convolution) has a state of fixed size: both are bounded already, and nothing is encoded there.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pte_trl.cache.bounded_layer import BoundedLayer, Rows
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import DynamicSlidingWindowLayer, LinearAttentionLayer, layer_types_and_sizes

ATTENTION = ("keys", "values", "accumulator", "queries")
STATES = ("conv_states", "recurrent_states")


class SlidingLayer(Rows, DynamicSlidingWindowLayer):
    """transformers' own layer of sliding or chunked attention; `reset` also makes it ready for another batch size."""

    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # transformers' own copies the window's size to the device here; no forward reads it.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0

    def map_rows(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = rows(self.keys), rows(self.values)


class RecurrentLayer(Rows, LinearAttentionLayer):
    """The states of a recurrent layer, (batch, ...). Every update is a new tensor, so that gradients can flow.

    transformers writes into one tensor, for CUDA graphs. The models' own step of a single token still writes in place,
    so autograd refuses a backward through such steps of Mamba layers; longer steps are fine. A layer without a state
    (an MLP or experts alone) has the same class and stays empty.
    """

    is_compileable = False
    is_croppable = False

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> Tensor:
        """What a convolution over the new columns has to see, (batch, channels, kernel size + new columns)."""
        if not self.is_conv_states_initialized[state_idx]:
            self.conv_kernel_size[state_idx] = conv_kernel_size or conv_states.shape[-1]
            self._begin(self.is_conv_states_initialized, state_idx, conv_states)
        size = self.conv_kernel_size[state_idx]
        if self.has_previous_state[state_idx]:
            seen = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            seen = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
            self.has_previous_state[state_idx] = True
        self.conv_states[state_idx] = seen[..., -size:].clone()  # a view would keep the whole prompt
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        if self.is_recurrent_states_initialized[state_idx]:
            recurrent_states = recurrent_states.to(self.recurrent_states[state_idx].dtype)
        else:
            self._begin(self.is_recurrent_states_initialized, state_idx, recurrent_states)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def settle(self) -> None:
        """Makes states of inference mode usable outside of it, where autograd cannot save them."""
        if not torch.is_inference_mode_enabled():
            RecurrentLayer.map_rows(self, lambda x: x.clone() if x.is_inference() else x)

    def _begin(self, initialized: dict[int, bool], state_idx: int, states: Tensor) -> None:
        initialized[state_idx] = True
        if self.device is None:
            self.dtype, self.device = states.dtype, states.device

    def reset(self) -> None:
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def map_rows(self, rows: Callable[[Tensor], Tensor]) -> None:
        for name in STATES:
            setattr(self, name, {i: x if x is None else rows(x) for i, x in getattr(self, name).items()})


class _AttentionAndState(RecurrentLayer):
    """A recurrent state beside the keys and values of `attention`, the class that a subclass inherits from as well."""

    attention: type[Rows]

    def __init__(self, *args, number_of_states: int = 1, **kwargs):
        RecurrentLayer.__init__(self, number_of_states)
        self.attention.__init__(self, *args, **kwargs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.attention.lazy_initialization(self, key_states, value_states)

    def reset(self) -> None:
        RecurrentLayer.reset(self)
        self.attention.reset(self)

    def map_rows(self, rows: Callable[[Tensor], Tensor]) -> None:
        RecurrentLayer.map_rows(self, rows)
        self.attention.map_rows(self, rows)

    def offload(self) -> None:
        RecurrentLayer.offload(self)
        self.attention.offload(self)

    def prefetch(self) -> None:
        RecurrentLayer.prefetch(self)
        self.attention.prefetch(self)


class HybridLayer(_AttentionAndState, BoundedLayer):
    """Full attention, bounded, and a recurrent state in one layer."""

    attention = BoundedLayer


class SlidingHybridLayer(_AttentionAndState, SlidingLayer):
    """Sliding attention and a recurrent state in one layer."""

    attention = SlidingLayer


# transformers' name of a layer type -> what is kept of it. `mlp` and `moe` have no attention, and keep nothing.
KINDS: dict[str, type[Rows]] = {
    "full_attention": BoundedLayer,
    "sliding_attention": SlidingLayer,
    "chunked_attention": SlidingLayer,
    "linear_attention": RecurrentLayer,
    "conv": RecurrentLayer,
    "mlp": RecurrentLayer,
    "moe": RecurrentLayer,
    "hybrid": HybridLayer,
    "hybrid_sliding": SlidingHybridLayer,
}


def layers_of(
    config: PreTrainedConfig, schedule: Schedule, kinds: Mapping[str, type[Rows]] | None = None
) -> list[Rows]:
    """An empty cache layer for every layer of a model that has one of its own, in order.

    Layers that use the keys and values of an earlier one (`num_kv_shared_layers`) are the last, and have none.

    Args:
        kinds: subclasses of those of `KINDS`, by the same names.

    Raises:
        ValueError: a layer of a type that is not in `KINDS`; no layer of full attention.
    """
    types, sizes = layer_types_and_sizes(config)
    check_layer_types(config)
    states = {"number_of_states": sizes.get("number_of_states", 1)}

    def make(kind: type[Rows]) -> Rows:
        first = {"schedule": schedule} if issubclass(kind, BoundedLayer) else {}
        if issubclass(kind, SlidingLayer):
            first = {"sliding_window": sizes["sliding_window"]}
        return kind(**first, **(states if issubclass(kind, RecurrentLayer) else {}))

    return [make((kinds or KINDS)[name]) for name in types]


def check_layer_types(config: PreTrainedConfig) -> None:
    """Refuses a model whose layers a bounded cache cannot keep.

    Raises:
        ValueError: naming the types of its layers and what is allowed.
    """
    types, sizes = layer_types_and_sizes(config)
    unknown = sorted(set(types) - set(KINDS))
    if unknown:
        raise ValueError(
            f"layer types {', '.join(unknown)} of this {config.model_type}: a bounded cache takes {', '.join(KINDS)}"
        )
    # transformers' layer keeps the last window - 1 tokens, and all of them if that is 0.
    if (sizes.get("sliding_window", 2) or 0) < 2:
        raise ValueError(f"sliding_window={sizes['sliding_window']} of this {config.model_type}: must be at least 2")
    if not any(issubclass(KINDS[name], BoundedLayer) for name in types):
        advice = "; set sliding_window=null (use_sliding_window=false) in the model's config if it can do without"
        raise ValueError(
            f"a bounded cache evicts from layers of full attention, this {config.model_type} has "
            f"{', '.join(sorted(set(types)))}{advice if 'sliding_window' in sizes else ''}"
        )


def held(layer: Rows) -> dict[str, Tensor]:
    """All tensors of a cache layer that carry the past and that gradients flow through, by name.

    Names: "keys", "values"; of a PTE adapter "accumulator", "queries"; "conv_states.N" and "recurrent_states.N" of a
    recurrent layer. What a layer does not hold (yet) is left out.
    """
    found = {name: getattr(layer, name, None) for name in ATTENTION}
    for name in STATES:
        found |= {f"{name}.{index}": x for index, x in getattr(layer, name, {}).items()}
    return {name: x for name, x in found.items() if x is not None}


def hold(layer: Rows, tensors: dict[str, Tensor]) -> None:
    """Puts tensors that `held` has named into a layer that has seen as many tokens."""
    for name, x in tensors.items():
        name, _, index = name.partition(".")
        if index:
            setattr(layer, name, {**getattr(layer, name), int(index): x})
        else:
            setattr(layer, name, x)
    if isinstance(layer, BoundedLayer) and tensors.keys() & {"keys", "values"}:
        layer.buffers = None


def copied(layer: Rows) -> Rows:
    """A shallow copy that can continue without changing the other: no tensor that both hold is written in place.

    Recurrent states are cloned, since fused kernels write them in place.
    """
    if isinstance(layer, BoundedLayer):
        layer.buffers = None  # a buffer that both would write into; the next one without gradients makes its own
    other = copy.copy(layer)
    for name, x in vars(layer).items():
        if isinstance(x, dict):
            setattr(other, name, {key: y.clone() if isinstance(y, Tensor) else y for key, y in x.items()})
    return other
