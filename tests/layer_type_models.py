"""Tiny models whose layers are not all of one type, or whose keys and values differ in width."""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from tests.models import VOCAB

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
WINDOW = 5  # of the models' own sliding layers: shorter than the longest prompt
COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
COMMON |= {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 512, "tie_word_embeddings": False}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SLIDES = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
DELTA = {f"linear_{name}": size for name, size in (("key_head_dim", 8), ("value_head_dim", 8), ("num_key_heads", 2))}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_d_ssm": 64}

# Architecture of transformers -> its configuration beyond `COMMON`.
CONFIGS = {
    "gemma3_text": SLIDES,
    "olmo3": SLIDES,
    "qwen2": SLIDES | {"use_sliding_window": True},  # a family whose steps can be compiled, without these layers
    "llama4_text": {"layer_types": [CHUNKED, FULL, CHUNKED], "attention_chunk_size": WINDOW}
    | {"no_rope_layers": [1, 0, 1], "num_local_experts": 2, "intermediate_size_mlp": 48},
    "qwen3_next": {"layer_types": [LINEAR, FULL, LINEAR], "num_experts": 4, "linear_num_value_heads": 4}
    | {"shared_expert_intermediate_size": 24}
    | EXPERTS
    | DELTA,
    "falcon_h1": MAMBA,
    "lfm2": {"layer_types": ["conv", FULL, "conv"]},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"num_key_value_heads": 4, "head_dim": 4}  # that of the rotary embedding
    | EXPERTS
    | LATENT,
    "qwen3_moe": {"num_experts": 4} | EXPERTS,
}


def mixed(name: str, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """The architecture `name` of `CONFIGS` with random weights, the same ones every time, in eval mode."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**COMMON | CONFIGS[name] | changes)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).eval()
    if any("experts" in parameter_name for parameter_name, _ in model.named_parameters()):
        model.set_experts_implementation("batched_mm")  # the default one has no float64
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name and parameter.dim() == 1:
                parameter.uniform_(0.8, 1.2)
            else:  # a scale at which the random net is not chaotic
                parameter.normal_(std=1.0 if id(parameter) in embeddings else 0.15)
    return model
