"""Whether an adapter fits a model: its family and shape, the modules the adapter names, and its own name."""

import copy

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.config import GEOMETRY, PteConfig
from pte_trl.adapter.encoder import FITTED
from pte_trl.adapter.layer import PteLinear
from pte_trl.adapter.placement import WHOLE_TEXT, attention_modules, linear_place, unwrapped
from pte_trl.adapter.self_test import check_by_self_test
from pte_trl.adapter.settings import ATTENTION_LINEARS, LINEARS, MLP_LINEARS
from pte_trl.cache.layers import check_layer_types
from pte_trl.compat.peft import check_target_module_exists
from pte_trl.compat.transformers import attention_of, layer_types

CONTAINERS = (*PteAttention.adapter_layer_names, *PteLinear.adapter_layer_names)
# Parts of the names that PTE's and PEFT's modules bring into a model.
ENCODER_PARTS = (
    *FITTED,
    "global_tokens",
    "query_map",
    "key_map",
    "value_map",
    "write_gate",
    "key_weight",
    "value_weight",
    "offset",
    "rule",
    "gate",
    "rate",
)
WRAPPER_PARTS = ("base_layer", "modules_to_save", "original_module")
OWN_PARTS = {*CONTAINERS, *ENCODER_PARTS, *WRAPPER_PARTS, "weight", "bias"}

# Rotary types whose frequencies depend on the length seen so far: decode and replay would rotate differently.
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def geometry_of(config) -> dict:
    """What an adapter's tensors are shaped by."""
    config = config.get_text_config(decoder=True)
    found = {name: getattr(config, name, None) for name in GEOMETRY}  # a family may lack some
    if found["head_dim"] is None and found["num_attention_heads"]:
        found["head_dim"] = config.hidden_size // config.num_attention_heads
    return found


def check_supported(
    config, method: str = "pte", adapter: PteConfig | None = None, attention: str | None = None
) -> None:
    """Refuses a model's configuration that would be wrong under a bounded cache, whatever its weights.

    What can be seen in the configuration is refused at once. The rest is for a self-test on a small random copy, whose
    result is kept beside the hub's cache.

    Args:
        method: "pte", or one whose decode has a bounded cache and no state, "lora_c".
        adapter: the PTE adapter, whose targets are tested; None for the default ones.
        attention: attention implementation that the model will run with, if it is not in `config`.

    Raises:
        ValueError: in one sentence: quantised weights, a length-dependent rotary, layers that a bounded cache cannot
            keep or share, no decoder, global tokens that cannot be divided among the heads; or the self-test's, with
            the layer and the difference that it measured.
    """
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"the model's config is a {type(config).__name__}; PTE takes models of transformers")
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type={config.model_type!r}: has an encoder; PTE takes decoders")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantised weights are not supported by PTE: load the model in bfloat16 or float32")
    for rotary in rotary_types(text):
        if rotary in LENGTH_DEPENDENT_ROTARY:
            raise ValueError(f"rope_type={rotary!r}: rotary frequencies that depend on the length are not supported")
    check_layer_types(text)
    if shared := getattr(text, "num_kv_shared_layers", None):
        raise ValueError(
            f"num_kv_shared_layers={shared}: layers that read the keys and values of another are not supported"
        )
    if text.is_heterogeneous:
        raise ValueError(
            f"model_type={text.model_type!r}: {', '.join(sorted(text.per_layer_attributes))} of its layers differ "
            "from one to the next, which is not supported"
        )
    if method == "pte" and adapter is not None and adapter.state_per_head:
        check_heads(adapter, text)
    check_by_self_test(config, method, adapter, attention or attention_of(config))


def check_heads(adapter: PteConfig, text: PreTrainedConfig) -> None:
    """Refuses a state per head where the global tokens cannot be divided among the heads.

    Of compressed keys the encoder itself does.
    """
    heads = key_heads(text)
    if adapter.num_global_tokens % heads:
        raise ValueError(
            f"num_global_tokens={adapter.num_global_tokens}: with state_per_head it must be a multiple of the model's "
            f"{heads} kv heads"
        )


def key_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values in a layer."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def rotary_types(config: PreTrainedConfig) -> set[str]:
    """Of all layers: the parameters may be given for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [x for x in parameters.values() if isinstance(x, dict)] or [parameters]
    return {x.get("rope_type", "default") for x in each}


def check_geometry(adapter: PteConfig, config) -> None:
    """Refuses an adapter that was made for a model of another shape than `config`, a model's configuration.

    Raises:
        ValueError: naming what differs, and what numbers of layers there are.
    """
    found = geometry_of(config)
    made_for = adapter.geometry or found
    if made_for != found:
        differ = [k for k in found if made_for.get(k) != found[k]]
        raise ValueError(
            "this PTE adapter does not fit the model: it was made for "
            + ", ".join(f"{k}={made_for.get(k)}" for k in differ)
            + "; the model has "
            + ", ".join(f"{k}={found[k]}" for k in differ)
        )
    layers = found["num_hidden_layers"]
    if adapter.layers_to_transform and max(adapter.layers_to_transform) >= layers:
        raise ValueError(
            f"layers_to_transform={adapter.layers_to_transform}: the model has the layers 0 to {layers - 1}"
        )


def adapted_linears(config: PteConfig, attention: str) -> dict[str, str]:
    """Name -> full name of the linears that are adapted in the layer whose attention module is called `attention`."""
    layer = attention.rpartition(".")[0]
    keys = {name: f"{attention}.{name}" for name in ATTENTION_LINEARS}
    keys |= {name: f"{layer}.mlp.{name}" for name in MLP_LINEARS}
    return {name: key for name, key in keys.items() if check_target_module_exists(config, key)}


def check_modules(config: PteConfig, model: nn.Module) -> None:
    """Compares the modules an adapter names with those a model has.

    Raises:
        ValueError: no causal language model, weights that are not in memory, no attention that PTE can go into,
            nothing left to adapt, a name without effect, a linear that a layer lacks, one of another kind, or a module
            to save that PTE itself goes into.
    """
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"{type(model).__name__}: PTE adapts causal language models, which decode token by token")
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded and getattr(model, "hf_device_map", None):
        raise ValueError(f"device_map: {offloaded[0]} is offloaded; PTE needs the weights where they are used")
    modules = dict(model.named_modules())
    attentions = attention_modules(model)
    if not attentions:
        raise ValueError(
            f"{type(model).__name__}: PTE finds no attention over the whole text with a layer_idx of its own, "
            "projections of its own keys and values, and an output projection"
        )
    whole = sum(kind in WHOLE_TEXT for kind in layer_types(model.config))
    own = len({unwrapped(modules[attention]).layer_idx for attention in attentions})
    if own < whole or own < len(attentions):
        raise ValueError(
            f"{type(model).__name__}: {whole} layers attend to the whole text by {own} attention modules; "
            "PTE takes a module for each, since S belongs to a layer"
        )
    _check_saved(config.modules_to_save or [], modules, attentions)
    linears = [each for attention in attentions for each in _checked_linears(config, attention, modules)]
    if config.exclude_modules:
        every = copy.copy(config)
        every.exclude_modules = None
        if len(linears) == sum(len(adapted_linears(every, attention)) for attention in attentions):
            raise ValueError(f"exclude_modules={config.exclude_modules!r}: is none of the linears in target_modules")
    if not linears:
        raise ValueError(
            f"target_modules={config.target_modules}, exclude_modules={config.exclude_modules!r}: nothing is left"
        )


def _checked_linears(config: PteConfig, attention: str, modules: dict[str, nn.Module]) -> list[str]:
    """Full names of the linears that are adapted in one layer, each of which is there and a plain linear."""
    layer = attention.rpartition(".")[0]
    places = {name: linear_place(modules[layer], modules[attention], name) for name in LINEARS}
    wanted = adapted_linears(config, attention)
    for name, key in wanted.items():
        if places[name] is None:
            there = [other for other, place in places.items() if place is not None]
            raise ValueError(
                f"target_modules: {layer} has no linear {name!r} of its own (PTE adapts no experts); allowed there "
                f"are {', '.join(there)}"
            )
        holder, attribute = places[name]
        linear = getattr(holder, attribute)
        linear = unwrapped(linear) if isinstance(linear, PteLinear) else linear
        if type(linear) is not nn.Linear:
            kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise ValueError(f"target_modules: {key} is {kind}; PTE adapts torch.nn.Linear alone")
    return list(wanted.values())


def _check_saved(names: list[str], modules: dict[str, nn.Module], attentions: list[str]) -> None:
    tuned = tuple(key + "." for key, module in modules.items() if isinstance(module, BaseTunerLayer))
    own = [key for key in modules if not key.startswith(tuned)] if tuned else list(modules)
    for name in names:
        found = [key for key in own if key and key.endswith(name)]  # as PEFT looks for them
        if not found:
            raise ValueError(f"modules_to_save={names}: the model has no module {name!r}")
        for key in found:
            around = any(attention.startswith(key + ".") for attention in attentions)
            inside = any(f"{key}.".startswith(attention + ".") for attention in attentions)
            if around or inside or {"mlp", "feed_forward"} & set(key.split(".")):
                raise ValueError(
                    f"modules_to_save={names}: {name!r} is {key}, which PTE goes into; allowed are modules outside "
                    "attention and MLP"
                )


def split_key(key: str) -> tuple[str, str | None, str]:
    """A name in a state dict -> what precedes its container of adapters, the container, and what follows it.

    `a.q_proj.pte_up.default.weight` -> (`a.q_proj.`, `pte_up`, `.default.weight`); of another one (`key`, None, "").
    """
    parts = key.split(".")
    for at, part in enumerate(parts):
        if part in CONTAINERS:
            rest = parts[at + 1 :]
            return "".join(f"{p}." for p in parts[:at]), part, "".join(f".{p}" for p in rest)
    return key, None, ""


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The name in a file of a tensor of this adapter; other names stay. The adapter may be called like a module."""
    head, container, tail = split_key(key)
    if not f"{tail}.".startswith(f".{adapter_name}."):
        return key
    return f"{head}{container}{tail.removeprefix('.' + adapter_name)}"


def check_adapter_name(model: nn.Module, name: str, others: list[str]) -> None:
    """Refuses names under which PyTorch or PEFT would not find an adapter's tensors again.

    Raises:
        ValueError: a name PyTorch cannot give to a module; or, where there are several adapters, one that is part of
            the name of any tensor: PEFT tells adapters apart by text alone then.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}: PyTorch cannot give it to a module; take another")
    if not others:
        return
    parts = set(OWN_PARTS)
    for key in model.state_dict():
        head, _, tail = split_key(key)
        before = head.split(".")
        if "modules_to_save" in before:
            del before[before.index("modules_to_save") + 1]  # the adapter's name
        parts.update(before, tail.split(".")[2:])
    for each in (name, *others):
        if each in parts:
            raise ValueError(
                f"adapter name {each!r}: is also the name of a module or parameter, and PEFT could not tell its "
                "tensors from another adapter's; an only adapter may have this name, one of several may not"
            )
