"""Where PTE enters a model: attention modules, found by what they can do, and their projections, by their part.

No architecture is named here. An attention module has a `layer_idx` of its own, projections of keys and values, and an
output projection; its layer attends to the whole text and has keys and values of its own. Whether PTE is right in it
is for the self-test to say (`pte_trl.adapter.self_test`).
"""

from torch import nn

from pte_trl.compat.transformers import layer_types

# What a projection is called in settings -> in models. Of `qkv_proj` the first rows give the queries.
ALIASES = {
    "q_proj": ("q_proj", "q_b_proj", "qkv_proj"),
    "k_proj": ("k_proj",),
    "v_proj": ("v_proj",),
    "o_proj": ("o_proj", "out_proj", "dense"),
}
KEYS_VALUES = ("k_proj", "qkv_proj", "kv_b_proj")  # one of them makes the keys
WHOLE_TEXT = ("full_attention", "hybrid")  # layer types whose attention has no window of its own


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module, adapted or not."""
    return getattr(module, "base_layer", module)


def named(attention: nn.Module, projection: str) -> str | None:
    """What an attention module calls a projection; None if it has none."""
    return next((name for name in ALIASES[projection] if getattr(attention, name, None) is not None), None)


def attention_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that PTE can go into, first layer first."""
    text = model.config.get_text_config(decoder=True)
    kinds = layer_types(text)
    return [key for key, module in model.named_modules() if _takes_pte(key, module, text, kinds)]


def _takes_pte(key: str, module: nn.Module, text, kinds: list[str]) -> bool:
    attention = unwrapped(module)
    index = getattr(attention, "layer_idx", None)
    if key.rpartition(".")[2] == "base_layer" or type(index) is not int:
        return False
    if not 0 <= index < len(kinds):  # a module that several layers call says -1 and is told the layer in each call
        return False
    # Of a model that also sees or hears, only the part that writes.
    same = getattr(getattr(attention, "config", text), "model_type", None) == text.model_type
    projects = any(getattr(attention, name, None) is not None for name in KEYS_VALUES)
    own = not getattr(attention, "is_kv_shared_layer", False)
    return same and projects and own and named(attention, "o_proj") is not None and kinds[index] in WHOLE_TEXT


def linear_place(layer: nn.Module, attention: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that holds a linear, and what it calls it; None if the layer has none of that name.

    Args:
        layer: the decoder layer.
        attention: its attention module, adapted or not.
        name: as in `target_modules`.
    """
    if name in ALIASES:
        holder = unwrapped(attention)
        found = named(holder, name)
        return None if found is None else (holder, found)
    # Linears of an MLP lie in a child of the layer; those of experts lie deeper, or are no linears at all.
    for child in layer.children():
        if child is not attention and isinstance(getattr(child, name, None), nn.Module):
            return child, name
    return None
