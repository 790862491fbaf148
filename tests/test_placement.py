"""Where PTE enters, architecture by architecture, and that a replay there repeats the decode, gradients included.

Families that transformers writes otherwise than Llama: queries, keys and values in one linear, other names, keys and
values that a cache holds compressed, norms over all heads, experts.
"""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen3MoeConfig,
)

from pte_trl import PteConfig
from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.layer import PteLinear
from pte_trl.adapter.model import pte_layers
from pte_trl.adapter.placement import attention_modules, unwrapped
from pte_trl.replay.segments import segment_logps
from tests.grids import grid
from tests.models import (
    TEMPERATURE,
    chosen,
    decode_logps,
    gap,
    left_padded_batch,
    randomise_up,
    replay_logps,
    schedules_of,
    tiny,
    with_pte,
)

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
LATENT |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, **EXPERTS}
CONFIGS = {
    "phi3": Phi3Config(**SHAPE),
    "phi": PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "olmo2": Olmo2Config(**SHAPE),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**{**SHAPE, **LATENT}, q_lora_rank=10),
    "deepseek_v3, queries whole": DeepseekV3Config(**{**SHAPE, **LATENT}, q_lora_rank=None),
}
TARGETS = {"qo": ["q_proj", "o_proj"], "o": ["o_proj"], "v": ["v_proj"]}
WINDOW, LENGTHS, COMPLETION = 4, (4, 2), 12


def base(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def adapted(config, dtype=torch.float64, **settings):
    settings = PteConfig(rank=3, num_global_tokens=4, alpha=3.0, **settings)
    model = get_peft_model(base(config, dtype), settings, autocast_adapter_dtype=False).eval()
    randomise_up(model)
    return model


def gradients(model, logps, ids, prompt) -> dict[str, torch.Tensor]:
    names, tensors = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(chosen(logps, ids, prompt).sum(), tensors, allow_unused=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.thorough if f == "phi" else ()) for f in CONFIGS]
)
def test_decode_replay_and_segments_agree(family):
    """In float64, but for experts, which transformers computes in float32 at most."""
    experts = hasattr(CONFIGS[family], "num_experts_per_tok")
    log_probs, gradient_share = (1e-4, 1e-2) if experts else (1e-9, 1e-6)
    model = adapted(CONFIGS[family], dtype=torch.float32 if experts else torch.float64)
    ids, mask, prompt = left_padded_batch(list(LENGTHS), COMPLETION)
    decoded = decode_logps(model, ids, mask, prompt, WINDOW)
    replayed = replay_logps(model, ids, mask, prompt, WINDOW)
    assert gap(decoded, replayed) < log_probs
    assert gap(decoded, replay_logps(model, ids, mask, prompt, WINDOW + 1)) > 1e-3
    segments, _ = segment_logps(
        model, ids, mask, prompt, schedules_of(WINDOW), segment_length=5, temperature=TEMPERATURE
    )
    assert gap(segments, chosen(decoded, ids, prompt)) < log_probs
    of_decode, of_replay = (gradients(model, logps, ids, prompt) for logps in (decoded, replayed))
    for name, gradient in of_decode.items():
        scale = gradient.norm().clamp(min=1e-3)
        assert (gradient - of_replay[name]).norm() < gradient_share * scale, name


@grid(targets=TARGETS, reentrant=[True, False])
def test_gradient_checkpointing_runs_the_probe_again(targets, reentrant):
    ids, mask, prompt = left_padded_batch(list(LENGTHS), COMPLETION)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = with_pte(tiny("qwen3", num_hidden_layers=2), target_modules=TARGETS[targets]).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        chosen(replay_logps(model, ids, mask, prompt, WINDOW), ids, prompt).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- what a replay runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ("q_proj", "o_proj", "up_proj"))
def test_every_projection_runs_once_in_a_replay(target, monkeypatch):
    """Also where queries need S, and S needs the keys: they are computed before, and not again."""
    model = with_pte(tiny(num_hidden_layers=1), target_modules=[target])
    ids, mask, prompt = left_padded_batch(list(LENGTHS), COMPLETION)
    attention = pte_layers(model)[0].base_layer
    names = ("q_proj", "k_proj", "v_proj")
    linears = {unwrapped(getattr(attention, name)).weight: name for name in names}
    runs, own = [], nn.functional.linear

    def counted(x, weight, bias=None):
        if weight in linears and x.shape[-2] >= ids.shape[1]:  # not those of the global tokens alone
            runs.append(linears[weight])
        return own(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    replay_logps(model, ids, mask, prompt, WINDOW)
    assert sorted(runs) == sorted(names)


def test_hooks_of_the_attention_run_once_and_its_linears_stay_whole():
    model = with_pte(tiny("llama", num_hidden_layers=1))
    attention, seen = pte_layers(model)[0].base_layer, []
    attention.register_forward_hook(lambda *_: seen.append(1), always_call=True)
    ids, mask, prompt = left_padded_batch(list(LENGTHS), COMPLETION)
    replay_logps(model, ids, mask, prompt, WINDOW)
    assert len(seen) == 1
    assert not any("forward" in vars(module) for module in model.modules())


# ---- where -------------------------------------------------------------------------------------------------------


def test_only_the_queries_of_one_linear_for_all():
    model = adapted(CONFIGS["phi3"])
    layer, x = pte_layers(model)[0], torch.randn(1, 3, 32, dtype=torch.float64)
    linear = layer.base_layer.qkv_proj
    assert linear.pte_up["default"].out_features == 32 < linear.base_layer.out_features == 64
    layer.in_use.set(torch.randn(4, 3, dtype=torch.float64))
    change = linear(x) - linear.base_layer(x)
    assert (change[..., :32] != 0).all() and (change[..., 32:] == 0).all()


def test_names_of_other_families():
    kinds = {}
    for family, config in CONFIGS.items():
        names = [name for name, module in adapted(config).named_modules() if isinstance(module, PteLinear)]
        kinds[family] = sorted(name.rpartition(".")[2] for name in names if ".layers.0." in name)
    assert kinds == {
        "phi3": ["o_proj", "qkv_proj"],
        "phi": ["dense", "q_proj"],
        "olmo2": ["o_proj", "q_proj"],
        "qwen3_moe": ["o_proj", "q_proj"],
        "deepseek_v3": ["o_proj", "q_b_proj"],
        "deepseek_v3, queries whole": ["o_proj", "q_proj"],
    }


def test_layers_with_a_window_of_their_own_are_left_alone():
    kinds = ["sliding_attention", "full_attention"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Gemma2Config(**SHAPE, head_dim=8, layer_types=kinds, sliding_window=4)
        )
    assert attention_modules(model) == ["model.layers.1.self_attn"]


def test_of_a_model_that_sees_only_what_writes():
    text = {**SHAPE, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    found = attention_modules(model)
    assert len(found) == 2 and all("language_model" in name or "vision" not in name for name in found)


@pytest.mark.parametrize("target", ["k_proj", "gate_proj"])
def test_a_linear_that_is_not_there(target):
    with pytest.raises(ValueError, match=rf"has no linear '{target}' of its own .* allowed there are q_proj, o_proj"):
        get_peft_model(base(CONFIGS["phi3"]), PteConfig(target_modules=["q_proj", target]))


def test_adapters_of_the_four_families_keep_their_names():
    model = with_pte(tiny("llama", num_hidden_layers=1))
    assert isinstance(model.base_model.model.model.layers[0].self_attn, PteAttention)
    assert "base_model.model.model.layers.0.self_attn.base_layer.q_proj.pte_up.default.weight" in model.state_dict()
