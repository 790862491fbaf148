"""A model's decoder layers as plain tensors, for a decode step that calls no modules (`pte_trl.rollouts.compiled`).

Tensors and not modules, since a compiler then sees no hooks, no PEFT and no layer numbers: what it makes of one layer
serves all of them. Base weights are shared with the model. Adapters are cast to the rollout's precision here, once per
rollout instead of at every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.layer import PteLinear, StateInUse
from pte_trl.cache.masks import BLOCKWISE
from pte_trl.compat.peft import LoraLinear
from pte_trl.compat.torch import forward_hooks
from pte_trl.compat.transformers import attention_of, decoder_classes


class Unsupported(Exception):
    """Why the decoder layers of a model cannot be read as plain tensors."""


class Norm(NamedTuple):
    """RMSNorm."""

    weight: Tensor
    eps: float


class Projection(NamedTuple):
    """A linear layer, y = W x + b + scale * up(S^T down(x)), without S for LoRA.

    Attributes:
        dtype: in which W x is computed: autocast's, or that of the weight.
        down, up: None without an adapter; of the precision they are computed in.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


class Before(NamedTuple):
    """What a decoder layer does before its attention."""

    norm: Norm
    query: Projection
    key: Projection
    value: Projection
    query_norm: Norm | None
    key_norm: Norm | None


class After(NamedTuple):
    """What a decoder layer does after its attention."""

    output: Projection
    norm: Norm
    gate: Projection
    up: Projection
    down: Projection


class Layer(NamedTuple):
    """One decoder layer.

    Attributes:
        scale: of the attention.
        state: (rows, n_g, r) accumulator -> S as the adapted linears multiply by it; None without a PTE adapter.
    """

    before: Before
    after: After
    scale: float
    state: Callable[[Tensor], Tensor] | None


FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def base_of(model: nn.Module) -> nn.Module:
    """The model without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Decoder:
    """Reads the layers of a model, again and again: copies of adapters lie where they lay before.

    Args:
        model: bare, LoRA or PTE.
    """

    def __init__(self, model: nn.Module):
        self.copies: dict[int, Tensor] = {}
        self.base = base_of(model)

    def read(self) -> tuple[list[Layer], Norm]:
        """The layers and the last norm, of the weights and adapters of now.

        Raises:
            Unsupported: what is computed there is not known here.
        """
        base = self.base
        if type(base) not in FAMILIES:
            raise Unsupported(f"{type(base).__name__} is none of {', '.join(known.__name__ for known in FAMILIES)}")
        attention, activation = attention_of(base.config), base.config.hidden_act
        if attention not in (*BLOCKWISE, "sdpa"):
            raise Unsupported(f"attn_implementation={attention!r}; allowed are {', '.join(BLOCKWISE)} and sdpa")
        if activation != "silu":
            raise Unsupported(f"hidden_act={activation!r}; allowed is silu")
        kind = base.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.kinds = decoder_classes(type(base))
        for layer in base.model.layers:
            check_forwards(layer)
        check_forwards(base.model.norm)
        return [self._layer(layer) for layer in base.model.layers], self._norm(base.model.norm)

    def _layer(self, layer: nn.Module) -> Layer:
        attention, state = layer.self_attn, None
        if isinstance(attention, PteAttention):
            name = attention._adapter()
            if name is not None:
                state = reading(attention, name)
            attention = attention.base_layer
        for module, kind in zip((layer, attention, layer.mlp), self.kinds, strict=False):
            check_type(module, kind)
        window = getattr(attention, "sliding_window", None) or getattr(self.base.config, "sliding_window", None)
        if window and getattr(attention, "layer_type", "sliding_attention") == "sliding_attention":
            raise Unsupported(f"sliding_window={window}")
        project = {name: self._projection(getattr(attention, f"{name}_proj")) for name in "qkvo"}
        inner = (
            self._norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )
        before = Before(self._norm(layer.input_layernorm), project["q"], project["k"], project["v"], *inner)
        mlp = (self._projection(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        after = After(project["o"], self._norm(layer.post_attention_layernorm), *mlp)
        return Layer(before, after, attention.scaling, state)

    def _norm(self, module: nn.Module) -> Norm:
        check_type(module, self.kinds[-1])
        return Norm(plain(module.weight), module.variance_epsilon)

    def _projection(self, module: nn.Module) -> Projection:
        linear = module.base_layer if isinstance(module, BaseTunerLayer) else module
        check_type(linear, nn.Linear)
        bias = None if linear.bias is None else plain(linear.bias)
        projection = Projection(plain(linear.weight), bias, self.autocast or linear.weight.dtype)
        if isinstance(module, BaseTunerLayer):
            down, up, scale = adapter_of(module)
            if down is not None:
                return projection._replace(down=self._cast(down), up=self._cast(up), scale=scale)
        return projection

    def _cast(self, linear: nn.Module) -> Tensor:
        """The weight of a part of an adapter in the rollout's precision; a copy lies where the last one lay."""
        check_type(linear, nn.Linear)
        if linear.bias is not None:
            raise Unsupported("an adapter with a bias (lora_bias)")
        weight = plain(linear.weight)
        dtype = self.autocast or weight.dtype
        if weight.dtype == dtype:
            return weight
        # By the parameter, which is the same object as long as the adapter is.
        key = id(linear.weight)
        if key not in self.copies:
            self.copies[key] = torch.empty_like(weight, dtype=dtype)
        return self.copies[key].copy_(weight)


def adapter_of(module: BaseTunerLayer) -> tuple[nn.Module | None, nn.Module | None, float]:
    """Down- and up-projection of a linear's active adapter, and its scale; (None, None, 1) if none is active."""
    if not (isinstance(module, PteLinear) or type(module) is LoraLinear):
        raise Unsupported(f"a linear adapted by {type(module).__name__}")
    if module.disable_adapters and not module.merged:
        return None, None, 1.0
    down, up, scale = (
        (module.pte_down, module.pte_up, module.scale)
        if isinstance(module, PteLinear)
        else (module.lora_A, module.lora_B, module.scaling)
    )
    names = [name for name in module.active_adapters if name in down]
    if len(names) > 1 or module.merged or any(name in getattr(module, "lora_variant", ()) for name in names):
        raise Unsupported(f"adapters {names or module.merged_adapters}, merged, several at once or of a LoRA variant")
    return (down[names[0]], up[names[0]], float(scale[names[0]])) if names else (None, None, 1.0)


def reading(attention: PteAttention, name: str) -> Callable[[Tensor], Tensor]:
    """Accumulator -> S as `x S` multiplies by it; transposed for the column reading, S x."""
    encoder, column = attention.pte_encoder[name], attention.config[name].read == "column"

    def state(accumulator: Tensor) -> Tensor:
        found = encoder.state(accumulator)
        return found.transpose(-2, -1) if column else found

    return state


def check_type(module: nn.Module, kind: type) -> None:
    if type(module) is not kind:
        raise Unsupported(f"a {type(module).__name__} where a {kind.__name__} is expected")


def check_forwards(layer: nn.Module) -> None:
    """Refuses hooks and replaced forwards, which a step without modules would leave out."""
    for name, module in layer.named_modules():
        # The state in use is emptied by one; here nothing is put into it.
        owners = [getattr(hook, "__self__", None) for hook in forward_hooks(module)]
        if not all(isinstance(owner, StateInUse) for owner in owners) or "forward" in module.__dict__:
            raise Unsupported(f"a hook or a forward of its own on {name or type(layer).__name__}")


def plain(parameter: Tensor) -> Tensor:
    """The tensor of a parameter, in the same memory."""
    tensor = parameter.detach()
    if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_floating_point():
        raise Unsupported(f"a weight of type {type(tensor).__name__} on {tensor.device}, {tensor.dtype}")
    return tensor
