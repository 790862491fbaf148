"""GRPO for real on a tiny model: rollout and replay agree inside the trainer, and nothing but the adapter moves."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from experiments.tiny.model import build, build_tokenizer
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.trainer import PteGRPOTrainer
from tests.models import randomise_up, tiny, with_pte

PROBLEMS = ["1+1", "12+34=", "7", "100+200+300"] * 4


def reward_of_length(completion_ids, **kwargs):
    """Any reward with spread."""
    return [float(len(ids) + sum(ids) % 5) for ids in completion_ids]


def model_of(vocabulary: int, family="qwen2"):
    model = tiny(family, torch.float32)
    model.resize_token_embeddings(vocabulary)
    return model


def trainer_for(tmp_path, method="pte", model=None, peft=True, **changes):
    tokenizer = build_tokenizer()
    settings = {
        "output_dir": str(tmp_path),
        "method": method,
        "window": None if method == "lora" else 8,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 40,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    script = RecipeArguments("unused", rank=4, num_global_tokens=4)
    return PteGRPOTrainer(
        model=model or model_of(len(tokenizer)),
        reward_funcs=reward_of_length,
        args=PteGRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROBLEMS]}),
        processing_class=tokenizer,
        peft_config=script.adapter_config(method) if peft else None,
    )


def logged(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("method", ["pte", "lora_c"])
@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1, "max_steps": 4},
        {"window": None, "budget": 24, "temperature": 0.6, "gradient_checkpointing": False},
    ],
    ids=["plain", "accumulated", "off-policy with KL", "budget"],
)
def test_the_replay_scores_what_was_sampled(tmp_path, method, batching):
    trainer = trainer_for(tmp_path, method, **batching)
    trainer.train()
    worst = logged(trainer, "mismatch/max")
    assert worst and max(worst) < 1e-4
    assert max(logged(trainer, "rollout/evictions")) > 2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_what_is_logged(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    for name in (
        "mismatch/mean",
        "mismatch/max",
        "mismatch/kl",
        "rollout/window",
        "rollout/evictions",
        "rollout/tokens_per_second",
        "rollout/cache_bytes_per_sample",
        "pte/update_over_state",
        "completions/format_rate",
        "completions/clipped_ratio",
        "frac_reward_zero_std",
    ):
        assert len(logged(trainer, name)) == 2, name


def test_only_the_adapter_moves_and_it_loads_again(tmp_path):
    tokenizer = build_tokenizer()
    model = model_of(len(tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(tmp_path, model=model)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if n in start and not torch.equal(p, start[n])]
    assert len(moved) == len(start), "a trainable tensor did not move"
    trainer.save_model(str(tmp_path))
    base = trainer.model.unload()
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = PeftModel.from_pretrained(base, str(tmp_path))
    assert any(p.abs().sum() > 0 for n, p in again.named_parameters() if "pte_up" in n)


def test_the_reference_is_the_base_with_the_full_cache(tmp_path):
    trainer = trainer_for(tmp_path, beta=0.1)
    trainer.train()
    ids, mask = torch.randint(5, 60, (4, 30)), torch.ones(4, 30, dtype=torch.long)
    trainer._samples = {"windows": torch.full((4,), 8)}
    score = trainer._get_per_token_logps_and_entropies
    with torch.no_grad(), trainer.model.disable_adapter():
        reference, _, _ = score(trainer.model, ids, mask, 24)
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 5:-1]
    full = logits.log_softmax(-1).gather(2, ids[:, 6:].unsqueeze(2)).squeeze(2)
    assert reference == pytest.approx(full, abs=1e-5)
    policy = score(trainer.model, ids, mask, 24)[0].detach()
    assert (policy - reference).abs().max() > 1e-3


def test_every_sample_is_scored_under_its_own_window(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    model = trainer.model.eval()
    ids, mask, windows = torch.randint(5, 60, (3, 40)), torch.ones(3, 40, dtype=torch.long), torch.tensor([5, 8, 13])
    trainer._samples = {"windows": windows}
    scored = trainer._get_per_token_logps_and_entropies(model, ids, mask, 34, batch_size=2)[0].detach()
    for row in range(3):
        inputs = replay_inputs(model, mask[row : row + 1], 6, Schedule(windows[row].item()))
        logits = model(input_ids=ids[row : row + 1], **inputs).logits[:, 5:-1]
        alone = logits.log_softmax(-1).gather(2, ids[row : row + 1, 6:].unsqueeze(2)).squeeze(2)
        assert scored[row] == pytest.approx(alone[0].detach(), abs=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"segment_length": 3, "offload_cache": True}], ids=["whole", "cut, offloaded"]
)
def test_both_replays_take_the_same_step(tmp_path, options):
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
    }
    stepped = []
    for replay in ({"replay": "one_pass"}, {"replay": "segments", **options}):
        torch.manual_seed(0)
        trainer = trainer_for(tmp_path, **sgd, **replay)
        randomise_up(trainer.model)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        assert max(logged(trainer, "mismatch/max")) < 1e-4
        assert logged(trainer, "pte/update_over_state")[0] > 0
        stepped.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if n in before})
    one_pass, segments = stepped
    for name, step in one_pass.items():
        assert step.norm() > 0, name
        assert (segments[name] - step).norm() <= 1e-3 * step.norm(), name


def test_segments_with_dropout_are_refused(tmp_path):
    model = with_pte(model_of(len(build_tokenizer())), dropout=0.1)
    with pytest.raises(ValueError, match="replay='segments': dropout in"):
        trainer_for(tmp_path, model=model, peft=False, replay="segments")


def test_an_adapter_to_start_from_is_not_its_own_reference(tmp_path):
    first = trainer_for(tmp_path, max_steps=1)
    first.train()
    first.save_model(str(tmp_path))
    model = PeftModel.from_pretrained(first.model.unload(), str(tmp_path), is_trainable=True)
    second = trainer_for(tmp_path, model=model, peft=False, beta=0.1)
    assert list(second.model.peft_config) == ["default"]
    second.train()
    assert logged(second, "kl")[0] > 0


def test_a_batch_without_spread_is_said_aloud(tmp_path, caplog):
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [0.0] * len(completion_ids)]
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "every group has zero reward spread" in caplog.text


def test_lora_keeps_the_full_cache_of_trl(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    trainer.train()
    assert not logged(trainer, "rollout/window")
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_the_tiny_model_of_the_demo_is_supported(tmp_path):
    model, _ = build(0)
    trainer = trainer_for(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert max(logged(trainer, "mismatch/max")) < 1e-4
