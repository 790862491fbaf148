"""LoRA's settings that a PTE adapter does not have, each with what to do instead, and checks of those it has.

`tests/test_peft_settings.py` walks the fields of `PteConfig`, `PeftConfig` and `LoraConfig`: one that is neither a
setting of PTE nor named here fails it.
"""

import math
from typing import Any

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS

RENAMED = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_rank": "rank", "lora_r": "rank"}

_SHARED = "all adapted linears of a layer share its S, which has one rank"
_LORA_WEIGHTS = "is about LoRA's matrices; PTE starts with a random down-projection and a zero up-projection"
REFUSED = {
    "alpha_pattern": "the scale alpha / rank is the same everywhere; use alpha",
    "alora_invocation_tokens": "which tokens use S follows from the evictions",
    "arrow_config": "routes between LoRA adapters; one PTE adapter is active at a time",
    "bias": "PTE trains no biases; to train a whole module besides the adapter, name it in modules_to_save",
    "corda_config": _LORA_WEIGHTS,
    "ensure_weight_tying": "PTE adapts no embeddings; a tied lm_head cannot be kept tied through modules_to_save",
    "eva_config": _LORA_WEIGHTS,
    "fan_in_fan_out": "is for Conv1D layers, which no supported model has",
    "init_lora_weights": _LORA_WEIGHTS,
    "kasa_config": _LORA_WEIGHTS,
    "layer_replication": "repeated layers would share keys, values and S; leave it out",
    "layers_pattern": "the decoder layers of every supported model are called layers; use layers_to_transform alone",
    "loftq_config": "is for quantised weights, which PTE does not support",
    "lora_bias": "PTE's linears have no bias",
    "lora_ga_config": _LORA_WEIGHTS,
    "megatron_config": "PTE does not support Megatron",
    "megatron_core": "PTE does not support Megatron",
    "monteclora_config": _LORA_WEIGHTS,
    "qalora_group_size": "is for quantised weights, which PTE does not support",
    "rank_pattern": f"{_SHARED}; use rank",
    "runtime_config": "PTE offloads nothing; leave it out",
    "target_parameters": "PTE adapts linear layers; use target_modules",
    "trainable_token_indices": "PTE trains no token embeddings; modules_to_save=['embed_tokens'] trains all of them",
    "use_bdlora": _LORA_WEIGHTS,
    "use_dora": "dW = A S B changes while a sample decodes, so that weights have no fixed norm; leave it out",
    "use_qalora": "is for quantised weights, which PTE does not support",
    "use_rslora": "the scale is alpha / rank; for alpha / sqrt(rank) set alpha to alpha * sqrt(rank)",
    "velora_config": _LORA_WEIGHTS,
}


def one_of(key: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: allowed are {', '.join(map(repr, allowed))}")


def check_names(given: dict[str, Any], known: set[str]) -> None:
    """Refuses arguments that `PteConfig` does not have.

    Raises:
        ValueError: one of LoRA's, with the name it has here or the reason.
        TypeError: any other. Its words are those by which PEFT recognises a setting of a later version in a file.
    """
    for key, value in given.items():
        if key in RENAMED:
            raise ValueError(f"{key}={value!r}: PteConfig calls it {RENAMED[key]}")
        if key in REFUSED:
            raise ValueError(f"{key}={value!r}: not a setting of PteConfig: {REFUSED[key]}")
        if key not in known:
            settings = ", ".join(sorted(known))
            raise TypeError(f"PteConfig got an unexpected keyword argument {key!r} (={value!r}); there are {settings}")


def integer(key: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={value!r}: must be an integer of at least {least}")


def number(key: str, value, allowed: str, accepts) -> None:
    """A finite int or float for which `accepts(value)`; `allowed` says so in words."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{key}={value!r}: must be a number {allowed}")


def names(key: str, value) -> list[str]:
    """A list of strings, none of them empty, without repetitions and in order."""
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise ValueError(f"{key}={value!r}: must be a list with at least one name")
    for name in value:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{key}={value!r}: {name!r} is not a name")
    return sorted(set(value))


def indices(key: str, value) -> list[int]:
    """One layer or several, as an ordered list."""
    value = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(value, (list, tuple, set, frozenset, range)) or not value:
        raise ValueError(f"{key}={value!r}: must be a layer's number or a list of them, from 0 on")
    for index in value:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"{key}={value!r}: {index!r} is not a layer's number; they go from 0 on")
    return sorted(set(value))
