"""Layers of other kinds in the memory estimate: what each keeps and holds, against tensors of real models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Lfm2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from trl.trainer.utils import add_fused_lm_head

from pte_trl.cache.schedule import Schedule
from pte_trl.estimate.shape import NotEstimated, shape_of
from pte_trl.estimate.terms import SHAPES, Job, count, estimate, one_pass, rollout_cache
from pte_trl.replay.plan import replay_inputs
from pte_trl.runtime.efficiency import attention_tflops, sliding_pairs, visible_pairs
from tests.test_estimate import counted

SIZE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
SIZE |= {"num_key_value_heads": 2, "vocab_size": 100}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
SLIDING = {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZE),
    "phi3, fused": lambda: Phi3Config(**SIZE, pad_token_id=0),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZE, **EXPERTS, head_dim=24, moe_intermediate_size=32),
    "olmoe": lambda: OlmoeConfig(**SIZE, **EXPERTS),
    "deepseek_v3, latent": lambda: DeepseekV3Config(
        **SIZE | {"num_key_value_heads": 4}, **LATENT, num_experts_per_tok=2
    ),
    "gemma3, sliding": lambda: Gemma3TextConfig(**SIZE, **SLIDING),
    "gemma3, wrapped": lambda: Gemma3Config(
        text_config={**SIZE, **SLIDING},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**SIZE, **EXPERTS, **DELTA, head_dim=16, moe_intermediate_size=32),
    "falcon_h1": lambda: FalconH1Config(**SIZE, **MAMBA, head_dim=16),
    "lfm2": lambda: Lfm2Config(
        **SIZE, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False, conv_L_cache=3
    ),
}


def held(layer) -> int:
    """Bytes of keys, values and states in a cache layer."""
    values = [value for value in vars(layer).values() if value is not None]
    nested = [list(v.values()) if isinstance(v, dict) else v if isinstance(v, (list, tuple)) else [v] for v in values]
    return sum(x.nbytes for group in nested for x in group if isinstance(x, Tensor) and x.is_floating_point())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_layer_keeps_is_what_its_cache_holds(name):
    config = CONFIGS[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shape, tokens = shape_of(config), 20
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.randint(1, 90, (1, tokens)), past_key_values=cache)
    assert len(shape.layers) == len(cache.layers)
    for expected, layer in zip(shape.layers, cache.layers, strict=True):
        own = 2 * (expected.cached * expected.kept(tokens) + expected.conv) + 4 * expected.recurrent
        assert held(layer) == own, expected.kind
    # What is in the cache is what the estimate of a rollout counts, where nothing is evicted.
    job = Job(config, 0, 0, "lora", tokens - 4, 4, None, rollout_batch=3, device="cpu")
    assert rollout_cache(job) == 3 * sum(map(held, cache.layers))


def test_a_window_bounds_full_layers_alone():
    config = CONFIGS["gemma3, sliding"]()
    job = Job(config, 0, 0, "lora_c", 16, 400, Schedule(32), rollout_batch=1, device="cpu")
    full, sliding = (next(x for x in shape_of(config).layers if x.bounded == bounded) for bounded in (True, False))
    assert (sliding.window, full.window) == (8, None)
    assert rollout_cache(job) == 2 * 2 * (full.cached * (16 + 32) + sliding.cached * sliding.kept(416))
    recurrent = Job(CONFIGS["falcon_h1"](), 0, 0, "pte", 16, 400, Schedule(32), rollout_batch=1, device="cpu")
    longer = Job(CONFIGS["falcon_h1"](), 0, 0, "pte", 16, 4000, Schedule(32), rollout_batch=1, device="cpu")
    assert rollout_cache(recurrent) == rollout_cache(longer)


LARGER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGER |= {"vocab_size": 1000}
STEPS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LARGER, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96, head_dim=32
    ),
    "olmoe": lambda: OlmoeConfig(**LARGER, num_experts=8, num_experts_per_tok=2, intermediate_size=128),
    "lfm2": lambda: Lfm2Config(
        **LARGER,
        intermediate_size=256,
        layer_types=["full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_activations_of_one_pass(name, checkpointing):
    config, prompt, completion = STEPS[name](), 64, 320
    adapter = LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    sizes = (count(config), count(config, adapter))
    # A replay of layers of several kinds is the business of pte_trl.replay; a short convolution is looked at alone.
    method, window = ("lora", None) if name == "lfm2" else ("lora_c", Schedule(64))
    options = {"dtype": torch.float32, "device": "cpu", "checkpointing": checkpointing}
    job = Job(config, *sizes, method, prompt, completion, window, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="blockwise")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, adapter).train()
    ids = torch.randint(1, 900, (1, prompt + completion))
    mask = torch.ones_like(ids)
    inputs = {"attention_mask": mask, "use_cache": False}
    if job.schedule is not None:
        inputs = replay_inputs(model, mask, prompt, window)

    def step():
        hidden = model.get_base_model().model(input_ids=ids, **inputs).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    assert one_pass(job) == pytest.approx(counted(step), rel=0.15)


def test_experts_count_whole_in_the_weights_and_by_token_in_the_step():
    config = AutoConfig.from_pretrained(SHAPES / "olmoe-1b-7b")
    assert count(config) / 1e9 == pytest.approx(6.92, abs=0.01)
    layer = shape_of(config).layers[0]
    assert (layer.inner, layer.routed, layer.experts) == (8 * 1024, 8, 64)


@pytest.mark.parametrize(("shape", "billions"), [("qwen3-4b", 4.02), ("lfm2-1.2b", 1.17)])
def test_the_models_of_the_recipes_are_counted_whole(shape, billions):
    assert count(AutoConfig.from_pretrained(SHAPES / shape)) / 1e9 == pytest.approx(billions, abs=0.006)


def test_what_is_not_known_is_said_in_one_sentence():
    falcon = Job(CONFIGS["falcon_h1"](), 0, 0, "pte", 16, 400, Schedule(32))
    for _ in range(2):  # also where it is known already
        with pytest.raises(
            NotEstimated, match=r"^not estimated for falcon_h1: what its recurrent layers hold in a tr"
        ):
            estimate(falcon)
    with pytest.raises(NotEstimated, match=r"^not estimated for gpt_neox: its attention has neither"):
        shape_of(GPTNeoXConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"}))


def test_flops_of_sliding_and_latent_layers():
    gemma, length = CONFIGS["gemma3, sliding"](), 20
    pairs = visible_pairs(4, 16, None)
    assert sliding_pairs(20, 8) == sum(min(8, at + 1) for at in range(20))
    heads = 4 * 4 * 32  # of a pair: 2 FLOPs for the score, 2 for the value, 4 heads of 32
    assert attention_tflops(gemma, pairs, length) * 1e12 == 2 * heads * (pairs + sliding_pairs(20, 8))
    latent = shape_of(CONFIGS["deepseek_v3, latent"]()).layers[0]
    assert (latent.query, latent.output, latent.cached) == (4 * 24, 4 * 16, 16 + 8)
