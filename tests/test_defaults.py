"""What TRL's users try first: its own defaults, truncated completions masked, and LoRA on any architecture."""

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from experiments.tiny.model import build_tokenizer
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillConfig
from tests.test_settings import distill, grpo, logged, model_of, settings, trained

STATED = ("bf16", "learning_rate")  # what the other tests set otherwise than TRL does


def with_trls_defaults(config, tmp_path, method: str):
    values = settings(tmp_path, method, **({} if config is PteDistillConfig else {"num_generations": 2}))
    args = config(**{key: value for key, value in values.items() if key not in STATED})
    assert args.bf16 and args.gradient_checkpointing
    return args


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "pte"),
        ("qwen2", "lora_c"),
        ("qwen3", "pte"),
        ("mistral", "lora_c"),
        *(pytest.param(*cell, marks=pytest.mark.thorough) for cell in (("llama", "lora_c"), ("qwen2", "pte"))),
        *(pytest.param(*cell, marks=pytest.mark.thorough) for cell in (("qwen3", "lora_c"), ("mistral", "pte"))),
    ],
)
def test_float32_weights_train_under_trls_bf16(tmp_path, method, family):
    model = model_of(len(build_tokenizer()), family)
    args = with_trls_defaults(PteGRPOConfig, tmp_path, method)
    trained(grpo(tmp_path, method, {"model": model, "args": args}))


@pytest.mark.parametrize("method", ["pte", "lora_c"])
def test_so_does_a_distillation(tmp_path, method):
    trained(distill(tmp_path, method, {"args": with_trls_defaults(PteDistillConfig, tmp_path, method)}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"replay": "segments"}, {"num_iterations": 2}, {"per_device_train_batch_size": 1, "steps_per_generation": 4}],
    ids=["one pass", "segments", "two iterations", "micro-batch of one"],
)
@pytest.mark.parametrize("method", ["pte", "lora_c"])
def test_some_completions_are_cut_and_masked(tmp_path, method, changes):
    trainer = grpo(tmp_path, method, mask_truncated_completions=True, max_steps=4, **changes)
    trainer.eos_token_ids = list(range(0, len(build_tokenizer()), 12))  # so that some end, and some do not
    trainer.train()
    shares = logged(trainer, "completions/clipped_ratio")
    assert any(0 < share < 1 for share in shares)
    worst = logged(trainer, "mismatch/max")
    assert worst and max(worst) < 1e-4
    assert max(logged(trainer, "grad_norm")) > 0


def test_entropy_has_the_same_gradient_under_segments(tmp_path):
    norms = []
    for replay in ("one_pass", "segments"):
        torch.manual_seed(0)
        # no reward spread: what moves the weights is the entropy alone
        arguments = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
        trainer = grpo(tmp_path, "pte", arguments, replay=replay, entropy_coef=0.5)
        trainer.train()
        norms.append(logged(trainer, "grad_norm"))
    assert min(norms[0]) > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


WORDS = len(build_tokenizer())
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": WORDS}
HEADS = {"num_attention_heads": 4, "intermediate_size": 64}
OTHERS = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=256), "c_attn"),
    "opt": (OPTConfig(**SIZE, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32), "q_proj"),
    "gpt_neox": (GPTNeoXConfig(**SIZE, **HEADS), "query_key_value"),
    "mamba": (MambaConfig(**SIZE, state_size=4), "in_proj"),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **SIZE,
            **HEADS,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        "q_proj",
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_lora_trains_any_architecture(tmp_path, family, capsys):
    config, linear = OTHERS[family]
    adapter = LoraConfig(r=2, target_modules=[linear], task_type="CAUSAL_LM")
    arguments = {"model": AutoModelForCausalLM.from_config(config), "peft_config": adapter}
    trainer = grpo(tmp_path, "lora", arguments, max_steps=1)
    trainer.max_prompt_tokens = 32
    trained(trainer)
    # What is known of a model is read off its modules: of these two the names of the linears suffice.
    known = family in ("opt", "qwen3_moe")
    assert (f"not estimated for {family}" in capsys.readouterr().out) != known
