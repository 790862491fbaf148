"""The load-balancing loss of a mixture of experts under a replay: TRL's own, number and gradient."""

import pytest
import torch
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from experiments.tiny.model import build_tokenizer
from pte_trl import PteConfig
from pte_trl.cache.schedule import Schedule, packed
from pte_trl.training import replays
from tests.grids import grid
from tests.models import left_padded_batch
from tests.test_trainer import logged, trainer_for

WORDS = len(build_tokenizer())
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZE |= {"vocab_size": WORDS, "intermediate_size": 32, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=16)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4)),
}
TARGETS = ["q_proj", "o_proj"]
ADAPTERS = {
    "lora_c": LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "router": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["gate"], task_type="CAUSAL_LM"),
    "pte": PteConfig(rank=4, num_global_tokens=4, target_modules=TARGETS),
}


def mixture(tmp_path, model="qwen3_moe", adapter="lora_c", attention="blockwise", asks=False, **changes):
    """A trainer of a small mixture of experts; `asks`: its configuration asks for router logits in every call."""
    torch.manual_seed(0)
    made = MODELS[model]()
    made.config.output_router_logits = asks
    made.set_attn_implementation(attention)
    method = "pte" if adapter == "pte" else "lora_c"
    trainer = trainer_for(tmp_path, method, model=made, peft=ADAPTERS[adapter], **changes)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "pte_up" in name:
                parameter.normal_(std=0.1)
    return trainer


def scored(trainer, window: int, ours: bool):
    """(aux loss, its gradient for every trainable tensor), by this project's scoring or by TRL's."""
    ids, mask, prompt = left_padded_batch([9, 5, 7], 24)
    ids %= WORDS
    trainer._samples = {"schedules": packed([Schedule(window)] * 3)}
    score = type(trainer)._get_per_token_logps_and_entropies if ours else None
    score = score or GRPOTrainer._get_per_token_logps_and_entropies
    given = (trainer.model, ids, mask, ids.shape[1] - prompt)
    logps, _, loss = score(trainer, *given, compute_entropy=True, compute_aux_loss=True)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, trained.values(), allow_unused=True, retain_graph=True)
    return loss, dict(zip(trained, gradients, strict=True)), logps


@grid(model=MODELS, adapter=["lora_c", "router"], attention=["blockwise", "eager"])
def test_where_nothing_is_evicted_it_is_what_trl_computes(tmp_path, model, adapter, attention):
    trainer = mixture(tmp_path, model, adapter, attention)
    (ours, own, logps), (theirs, their_own, their_logps) = (scored(trainer, 64, ours) for ours in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(logps, their_logps, rtol=1e-4, atol=1e-5)
    assert any(g is not None and g.abs().max() > 1e-6 for g in own.values())
    assert ("gate" in "".join(name for name, g in own.items() if g is not None)) == (adapter == "router")
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, their_own[name], rtol=1e-3, atol=1e-7)
    evicted, *_ = scored(trainer, 4, True)
    assert (evicted - theirs).abs() > 1e-6  # of what the tokens were sampled under, not of the full cache


@pytest.mark.parametrize("adapter", ["lora_c", "pte"])
def test_a_training_logs_it_and_replays_what_was_sampled(tmp_path, adapter):
    """Also where the model's configuration asks for router logits, which a decode and its replay have no use for."""
    trainer = mixture(tmp_path, adapter=adapter, asks=True, max_steps=1)
    trainer.train()
    assert logged(trainer, "aux_loss")[0] > 0
    assert logged(trainer, "mismatch/max")[0] < 1e-3


def test_segments_do_not_go_with_it(tmp_path):
    sentence = (
        r"^replay='segments': the load-balancing loss \(router_aux_loss_coef=0\.5\) .* router_aux_loss_coef=0\.0"
    )
    with pytest.raises(ValueError, match=sentence):
        mixture(tmp_path, replay="segments")
    trainer = mixture(tmp_path)
    assert "load-balancing loss" in replays.segments_refused(trainer.args, None, trainer.model)
    without = mixture(tmp_path, replay="segments", router_aux_loss_coef=0.0, asks=True, max_steps=1)
    without.train()
    assert not logged(without, "aux_loss") and logged(without, "mismatch/max")[0] < 1e-3
