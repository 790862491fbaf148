"""The PEFT tuner: puts PTE into the decoder layers of a supported model."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.fit import (
    adapted_linears,
    check_adapter_name,
    check_geometry,
    check_modules,
    check_supported,
    geometry_of,
    without_adapter_name,
)
from pte_trl.adapter.layer import PteLinear, StateInUse
from pte_trl.adapter.placement import attention_modules, linear_place
from pte_trl.adapter.projections import fused, query_width
from pte_trl.adapter.settings import ATTENTION_LINEARS
from pte_trl.compat.peft import check_target_module_exists


class PteModel(BaseTuner):
    """Progressive Thought Encoding as a PEFT tuner; made by `get_peft_model(model, PteConfig(...))`."""

    prefix = "pte_"
    tuner_layer_cls = (PteAttention, PteLinear)
    target_module_mapping: dict = {}  # noqa: RUF012 (PEFT's own attribute)

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, *args, **kwargs):
        # A mapping comes from a PeftModel; a config alone from inject_adapter_in_model, as transformers calls it.
        if isinstance(peft_config, PteConfig) and peft_config.modules_to_save:
            raise ValueError(
                f"modules_to_save={peft_config.modules_to_save}: transformers' from_pretrained, load_adapter and "
                "pipeline would leave these modules as the base has them; use PeftModel.from_pretrained(model, FOLDER)"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        check_adapter_name(model, adapter_name, [name for name in self.peft_config if name != adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PteConfig, model_config: dict) -> PteConfig:
        # A copy, into which the geometry goes: the caller's config then serves a model of another shape as well.
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        self.peft_config[name] = copy.copy(peft_config)
        return self.peft_config[name]

    def _prepare_model(self, peft_config: PteConfig, model: PreTrainedModel) -> None:
        """Refuses what cannot work while the model is still untouched."""
        check_supported(getattr(model, "config", None), "pte", peft_config)
        check_geometry(peft_config, model.config)
        check_modules(peft_config, model)
        peft_config.geometry = geometry_of(model.config)
        self.attentions = set(attention_modules(model))

    def _check_target_module_exists(self, peft_config: PteConfig, key: str):
        # The attention of a decoder layer is the one place where PTE enters; its linears follow from there.
        if key in self.attentions:
            return bool(adapted_linears(peft_config, key))
        found = check_target_module_exists(peft_config, key)
        return False if found else found  # PEFT counts what is excluded

    def _create_and_replace(self, peft_config: PteConfig, adapter_name: str, target, target_name, parent, current_key):
        if current_key not in self.attentions:
            return  # found in a state dict (`inject_adapter_in_model`); its layer's attention sees to it
        if not isinstance(target, PteAttention):
            target = PteAttention(target, StateInUse())
            setattr(parent, target_name, target)
        inference = peft_config.inference_mode
        target.update_layer(adapter_name, peft_config, inference)
        for name in adapted_linears(peft_config, current_key):
            holder, attribute = linear_place(parent, target, name)
            linear = getattr(holder, attribute)
            if not isinstance(linear, PteLinear):
                queries = name == "q_proj" and fused(target.base_layer)
                linear = PteLinear(linear, target.in_use, query_width(target.base_layer) if queries else None)
                setattr(holder, attribute, linear)
            linear.update_layer(adapter_name, peft_config, inference)
            if name not in ATTENTION_LINEARS:
                target.empty_after(holder)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's own method copies `weight`, which an attention module does not have.
        if isinstance(child, PteAttention):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks at the end of a key only, and would leave the name before an encoder's maps in the file.
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config: PteConfig, adapter_name: str, state_dict: dict) -> dict:
        """PEFT's, but an adapter of which tensors are missing is refused; PEFT warns and leaves random ones."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        wanted = adapter_keys(model, adapter_name)
        missing = sorted(wanted - found.keys())
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(wanted)} tensors of adapter {adapter_name!r} are missing in what is "
                f"loaded, among them {missing[0]}"
            )
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        # PEFT drops the argument for methods without this hook, and one adapter would serve every row.
        if adapter_names is not None:
            raise ValueError(f"adapter_names={adapter_names!r}: one PTE adapter serves a whole batch; use set_adapter")
        yield

    def add_weighted_adapter(self, *args, **kwargs):
        raise ValueError(
            "PTE adapters cannot be added up: dW = A S B is a product, and S follows from each adapter's own maps"
        )

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


def active_layers(model: nn.Module) -> list[PteAttention]:
    """Those in which a PTE adapter is active now."""
    return [layer for layer in pte_layers(model) if layer._adapter() is not None]


def adapter_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Names in the model's state dict of the tensors of one PTE adapter, `modules_to_save` left out."""
    return {
        f"{prefix}.{container}.{adapter_name}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, PteAttention | PteLinear)
        for container in module.adapter_layer_names
        if adapter_name in getattr(module, container)
        for key in getattr(module, container)[adapter_name].state_dict()
    }


def evicted_encoders(model: nn.Module) -> dict[int, Callable[..., torch.Tensor]]:
    """Layer index -> its step at an eviction, (keys, values, queries, accumulator) -> accumulator; only layers that
    encode."""
    layers = [(layer, layer._adapter()) for layer in active_layers(model)]
    return {
        layer.base_layer.layer_idx: partial(layer.encode, name)
        for layer, name in layers
        if layer.config[name].encode_evicted
    }


def adapters_disabled(model: nn.Module) -> bool:
    """Whether the model runs as its base now (`disable_adapter`), as TRL does for the reference of the KL term."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)
