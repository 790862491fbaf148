"""Tiny random models whose layers differ: sliding, recurrent and hybrid layers beside full attention."""

from functools import cache as made_once

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import VOCAB, decode_logps, gap, left_padded_batch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 512}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 4}
# Family -> what its configuration needs besides SHAPE. A chunk of a recurrent layer is shorter than the prompt.
FAMILIES = {
    "gemma3_text": SLIDING,
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "shared_expert_intermediate_size": 24,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma2": SLIDING,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 5},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        **{"attention_chunk_size": 6, "num_local_experts": 4, "no_rope_layers": [1, 0, 1]},
    },
}
APART = {
    "jamba": {
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        **{"mamba_d_state": 8, "num_experts": 4},
    },
}
EAGER = ("gpt_oss", "gemma2")  # sinks, soft-capped scores
FLOAT32 = EAGER  # gpt_oss computes in it, and an eager float64 mask of gemma2 overflows there
SLIDES = ("gemma3_text", "olmo3", "cohere2", "gpt_oss")
RECURS = ("qwen3_next", "falcon_h1", "bamba", "lfm2")
MAIN = (*SLIDES, *RECURS)
WINDOW, COMPLETION = 8, 25
CLOSE = 1e-9
CLOSE_FLOAT32 = 1e-4  # of log-probs around 50
WRONG = 0.01


@pytest.fixture(autouse=True)
def all_in_float64(monkeypatch, request):
    """Parts of a model that would compute in float32 do it in float64, where the model has this precision."""
    if getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("family") in FLOAT32:
        return
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wide_to(x, *args, **kwargs):
        if x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return x
        return to(x, *args, **kwargs)

    def wide_softmax(x, *args, **kwargs):
        return softmax(x, *args, **{**kwargs, "dtype": torch.promote_types(x.dtype, kwargs.get("dtype") or x.dtype)})

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)


def close(family: str) -> float:
    return CLOSE_FLOAT32 if family in FLOAT32 else CLOSE


def usual(of: tuple[str, ...], *names: str) -> pytest.MarkDecorator:
    """`parametrize` over families; those that are not named run with `make test-all`."""
    cells = [pytest.param(name, marks=() if name in names else pytest.mark.thorough) for name in of]
    return pytest.mark.parametrize("family", cells)


@made_once
def model_of(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | (FAMILIES | APART)[family])
    attention = "eager" if family in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    model = model.to(torch.float32 if family in FLOAT32 else torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 0.15)
    return model


def batch():
    """Prompts padded on the left, a completion padded on the right."""
    ids, mask, prompt = left_padded_batch([9, 4], COMPLETION)
    mask[1, -4:] = 0
    return ids, mask, prompt


@made_once
def decoded(family: str):
    """(batch, completion, vocabulary) log-probs of feeding token by token."""
    ids, mask, prompt = batch()
    with torch.no_grad():
        return decode_logps(model_of(family), ids, mask, prompt, WINDOW)


def apart(family: str, logps: torch.Tensor) -> float:
    """The largest difference from the decode, padding aside."""
    _, mask, prompt = batch()
    real = mask[:, prompt:].bool()
    return gap(logps[real], decoded(family)[real])
