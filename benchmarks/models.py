"""Models of named shapes with random weights: speed and memory do not depend on the weights."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import pte_trl
from pte_trl import PteConfig
from pte_trl.adapter.settings import MLP_LINEARS

SHAPES = {folder.name: folder for folder in sorted((Path(pte_trl.__file__).parent / "estimate/shapes").iterdir())}
TARGETS, RANK = ["q_proj", "o_proj"], 32
# What a "pte ..." adapter has over the default.
ENCODERS = {
    "sum": {"state_update": "sum"},
    "gated_sum": {"state_update": "gated_sum"},
    "delta": {"state_update": "delta"},
    "write_gate": {"write_gate": True},
    "state_per_head": {"state_per_head": True},
    "centre": {"centre": True},
    "whiten": {"whiten": True},
    "qkvo": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"target_modules": [*TARGETS, *MLP_LINEARS]},  # as the recipes
}


def random_model(
    shape: str,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "blockwise",
    **changes,
) -> PreTrainedModel:
    """A model of a named shape with random weights; the same seed gives the same weights.

    Args:
        changes: over the shape's configuration.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: allowed are {', '.join(SHAPES)}")
    config = AutoConfig.from_pretrained(SHAPES[shape], **changes)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def shared_copy(model: PreTrainedModel, attention: str = "blockwise") -> PreTrainedModel:
    """Another model over the very same weights, so that every arm finds room beside the others on one GPU."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    other.set_attn_implementation(attention)
    return other


def with_adapter(
    model: PreTrainedModel, adapter: str, targets: list[str] | None = None, rank: int = RANK
) -> PeftModel:
    """The model with an adapter that does something: its up-projection is not zero.

    Args:
        adapter: "lora", "pte", or "pte " and a name of ENCODERS.
    """
    targets = targets or TARGETS
    if adapter == "lora":
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    else:
        encoder = ENCODERS.get(adapter.removeprefix("pte "), {})
        heads = model.config.num_key_value_heads if encoder.get("state_per_head") else 1
        tokens = -(-rank // heads) * heads  # each head has as many
        sizes = {"rank": rank, "num_global_tokens": tokens, "alpha": rank, "target_modules": targets}
        config = PteConfig(**(sizes | encoder))
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "pte_up" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted
