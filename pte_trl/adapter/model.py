"""The PEFT tuner: puts PTE into every decoder layer of a supported model."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from pte_trl.adapter.config import ATTENTION_LINEARS, PteConfig
from pte_trl.adapter.layer import PteAttention, PteLinear, StateInUse

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary types whose frequencies depend on the length seen so far: decode and replay would rotate differently.
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def geometry_of(config) -> dict:
    """What an adapter's tensors are shaped by."""
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def check_supported(config) -> None:
    """Refuses a model's configuration that would be silently wrong under a bounded cache.

    Raises:
        ValueError: another family, sliding-window layers, quantised weights, or a length-dependent rotary.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: PTE supports {', '.join(FAMILIES)}")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding or (model_type == "mistral" and getattr(config, "sliding_window", None) is not None):
        raise ValueError(
            f"{model_type} with sliding_window={config.sliding_window}: layers with a window of their own are not "
            "supported; set sliding_window=null (use_sliding_window=false) in the model's config"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantised weights are not supported by PTE: load the model in bfloat16 or float32")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary in LENGTH_DEPENDENT_ROTARY:
        raise ValueError(f"rope_type={rotary!r}: rotary frequencies that depend on the length are not supported")


class PteModel(BaseTuner):
    """Progressive Thought Encoding as a PEFT tuner; made by `get_peft_model(model, PteConfig(...))`."""

    prefix = "pte_"
    tuner_layer_cls = (PteAttention, PteLinear)
    target_module_mapping: dict = {}  # noqa: RUF012 (PEFT's own attribute)

    def _prepare_adapter_config(self, peft_config: PteConfig, model_config: dict) -> PteConfig:
        return peft_config

    def _prepare_model(self, peft_config: PteConfig, model: PreTrainedModel) -> None:
        check_supported(getattr(model, "config", None))
        found = geometry_of(model.config)
        made_for = peft_config.geometry or found
        if made_for != found:
            differ = [k for k in found if made_for.get(k) != found[k]]
            raise ValueError(
                "this PTE adapter does not fit the model: it was made for "
                + ", ".join(f"{k}={made_for.get(k)}" for k in differ)
                + "; the model has "
                + ", ".join(f"{k}={found[k]}" for k in differ)
            )
        # Into a copy: the caller's config then serves a model of another shape as well.
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = filled = copy.copy(config)
                filled.geometry = found

    @staticmethod
    def _check_target_module_exists(peft_config: PteConfig, key: str) -> bool:
        # The attention of a decoder layer is the one place where PTE enters; its linears follow from there.
        return key.rsplit(".", 1)[-1] == "self_attn"

    def _create_and_replace(self, peft_config: PteConfig, adapter_name: str, target, target_name, parent, current_key):
        if not isinstance(target, PteAttention):
            in_use = StateInUse()
            target = PteAttention(target, in_use)
            setattr(parent, target_name, target)
        inference = peft_config.inference_mode
        target.update_layer(adapter_name, peft_config, inference)
        for name in peft_config.target_modules:
            holder = target.base_layer if name in ATTENTION_LINEARS else parent.mlp
            linear = getattr(holder, name)
            if not isinstance(linear, PteLinear):
                if type(linear) is not nn.Linear:
                    raise ValueError(f"{current_key}: {name} is a {type(linear).__name__}, PTE adapts nn.Linear")
                linear = PteLinear(linear, target.in_use)
                setattr(holder, name, linear)
            linear.update_layer(adapter_name, peft_config, inference)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's own copies `weight`, which an attention module does not have.
        if isinstance(child, PteAttention):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks at the end of a key only, and would leave the name before an encoder's maps in the file:
        # an adapter saved under one name and loaded under another would keep random maps.
        key = key.replace(f"pte_encoder.{adapter_name}.", "pte_encoder.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _check_merge_allowed(self):
        raise ValueError(
            "a PTE adapter cannot be merged: its dW = A S B differs from sample to sample and changes while a "
            "sample decodes. Keep it as an adapter; unload() gives the base model back."
        )

    def merge_adapter(self, *args, **kwargs):
        self._check_merge_allowed()


def pte_layers(model: nn.Module) -> list[PteAttention]:
    """The PTE attention modules of a model, first layer first; empty without a PTE adapter."""
    return [m for m in model.modules() if isinstance(m, PteAttention)]


def evicted_encoders(model: nn.Module) -> list[Callable[..., torch.Tensor]]:
    """Of every layer, (keys, values, queries, memory) -> memory at an eviction; empty if the model encodes nothing."""
    layers = [(layer, layer._adapter()) for layer in pte_layers(model)]
    return [
        partial(layer.encode, name) for layer, name in layers if name is not None and layer.config[name].encode_evicted
    ]
