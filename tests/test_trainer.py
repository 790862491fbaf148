"""GRPO for real on a tiny model: rollout and replay agree inside the trainer, and nothing but the adapter moves."""

from statistics import fmean

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOTrainer

from experiments.tiny.model import build, build_tokenizer
from pte_trl.cache.schedule import Schedule, packed
from pte_trl.estimate.choice import Replay
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts.ring import aligned
from pte_trl.runtime.resume import differences
from pte_trl.runtime.sharding import check_engine, rollout_engine_must_go
from pte_trl.training import calibrate, replays
from pte_trl.training import trainer as trainer_module
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.calibrate import longest_prompt
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.trainer import PteGRPOTrainer
from tests.grids import grid
from tests.models import gap, left_padded_batch, randomise_up, replay_logps, tiny, with_pte

PROBLEMS = ["1+1", "12+34=", "7", "100+200+300"] * 4


def reward_of_length(completion_ids, **kwargs):
    """Any reward with spread."""
    return [float(len(ids) + sum(ids) % 5) for ids in completion_ids]


def watched(seen: list):
    """The same reward, which keeps what it was given."""

    def reward(completion_ids, **kwargs):
        seen.append(completion_ids)
        return reward_of_length(completion_ids)

    return reward


def model_of(vocabulary: int, family="qwen2"):
    model = tiny(family, torch.float32)
    model.resize_token_embeddings(vocabulary)
    return model


def trainer_for(tmp_path, method="pte", model=None, peft=True, trainer_class=PteGRPOTrainer, **changes):
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
    return trainer_class(
        model=model or model_of(len(tokenizer)),
        reward_funcs=reward_of_length,
        args=PteGRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROBLEMS]}),
        processing_class=tokenizer,
        peft_config=script.adapter_config(method) if peft is True else peft or None,
    )


def logged(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


BATCHINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "off-policy with KL": {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1, "max_steps": 4},
    "budget": {"window": None, "budget": 24, "temperature": 0.6, "gradient_checkpointing": False},
    # Prompts of 1 to 11 tokens: a micro-batch of two groups has two windows.
    "auto": {"window": "auto", "gradient_accumulation_steps": 2},
    "auto, segments": {"window": "auto", "replay": "segments"},
}


@grid(batching=BATCHINGS, method=["lora_c", "pte"])
def test_the_replay_scores_what_was_sampled(tmp_path, batching, method):
    trainer = trainer_for(tmp_path, method, **BATCHINGS[batching])
    trainer.train()
    worst = logged(trainer, "mismatch/max")
    assert worst and max(worst) < 1e-4
    assert max(logged(trainer, "rollout/evictions")) > 2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_what_is_logged(tmp_path, monkeypatch):
    """Every number again from the completions themselves, which the reward function gets to see.

    A random model boxes nothing and rarely ends: an even length counts as a box, and thirty tokens end a completion.
    """
    seen = []
    monkeypatch.setattr(trainer_module, "has_boxed", even := lambda text, answer_after=None: len(text) % 2 == 0)
    model = model_of(len(build_tokenizer()))
    model.generation_config.eos_token_id = list(range(30))
    trainer = trainer_for(tmp_path, model=model)
    tokenizer = trainer.processing_class
    trainer.reward_funcs = [watched(seen)]
    trainer.train()
    assert [len(batch) for batch in seen] == [8, 8]
    window, evict = 8, 2
    ended = [[ids[-1] in (tokenizer.eos_token_id, *range(30)) for ids in batch] for batch in seen]
    texts = [tokenizer.batch_decode(batch, skip_special_tokens=True) for batch in seen]
    rewards = [torch.tensor(reward_of_length(batch)).view(2, 4) for batch in seen]
    expected = {
        "rollout/window": [window] * 2,
        # The last token of a completion is not fed to the model again.
        "rollout/evictions": [fmean(max(0, -(-(len(ids) - 1 - window) // evict)) for ids in batch) for batch in seen],
        "completions/format_rate": [fmean(map(even, batch)) for batch in texts],
        "completions/clipped_ratio": [1 - fmean(batch) for batch in ended],
        "completions/mean_length": [fmean(map(len, batch)) for batch in seen],
        "reward": [batch.mean().item() for batch in rewards],
        "frac_reward_zero_std": [(batch.std(1) == 0).float().mean().item() for batch in rewards],
    }
    for name, values in expected.items():
        assert logged(trainer, name) == pytest.approx(values, abs=1e-6), name
    lengths = [len(ids) for batch in seen for ids in batch]
    assert min(lengths) < window < max(lengths) and 0 < max(expected["completions/format_rate"]) < 1
    mean, worst, kl = (logged(trainer, f"mismatch/{name}") for name in ("mean", "max", "kl"))
    for m, w, k in zip(mean, worst, kl, strict=True):
        assert 0 < k < 1e-6 and w < 1e-4
        # k is half the mean of d * d, which is at least m * m and at most m * w.
        assert 0.9 * m * m <= 2 * k <= 1.1 * m * w
    token = 2 * 3 * 2 * 8 * 4  # keys and values of 3 layers with 2 heads of 8 numbers of 4 bytes
    state = 3 * 4 * 4 * 4  # S of 3 layers, 4 times 4 numbers of 4 bytes
    prompt = longest_prompt(trainer, trainer.train_dataset)
    for held in logged(trainer, "rollout/cache_bytes_per_sample"):
        assert (held - state) % token == 0 and window < (held - state) / token <= aligned(prompt + window)
    sampled, took = [sum(map(len, batch)) for batch in seen], logged(trainer, "step_time")
    speeds = logged(trainer, "rollout/tokens_per_second")
    assert all(speed > count / time for speed, count, time in zip(speeds, sampled, took, strict=True))
    # At the start B is zero, but S is updated all the same, by what the calibration has made of it.
    assert 0.1 < logged(trainer, "pte/update_over_state")[0] < 0.5


def test_only_the_adapter_moves_and_it_loads_again(tmp_path):
    tokenizer = build_tokenizer()
    model = model_of(len(tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(tmp_path, model=model)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trained = {n: trainer.model.get_parameter(n).detach().clone() for n in start}
    assert [n for n in start if torch.equal(trained[n], start[n])] == [], "trainable tensors that did not move"
    ids, mask, prompt = left_padded_batch([6, 3], 24)
    with torch.no_grad():
        logps = replay_logps(trainer.model.eval(), ids, mask, prompt, 8)
    trainer.save_model(str(tmp_path))
    base = trainer.model.unload()
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for name, value in trained.items():
        assert torch.equal(again.get_parameter(name), value), name
    with torch.no_grad():
        assert torch.equal(replay_logps(again, ids, mask, prompt, 8), logps)
        with again.disable_adapter():
            assert gap(replay_logps(again, ids, mask, prompt, 8), logps) > 1e-3, "the adapter does nothing"


def test_the_reference_is_the_base_with_the_full_cache(tmp_path):
    trainer = trainer_for(tmp_path, beta=0.1)
    trainer.train()
    ids, mask = torch.randint(5, 60, (4, 30)), torch.ones(4, 30, dtype=torch.long)
    trainer._samples = {"schedules": packed([Schedule(8)] * 4)}
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
    ids, mask = torch.randint(5, 60, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    schedules = [Schedule(5), Schedule(8, 0.5), Schedule(8, 0.1)]
    trainer._samples = {"schedules": packed(schedules)}
    scored = trainer._get_per_token_logps_and_entropies(model, ids, mask, 34, batch_size=2)[0].detach()
    for row in range(3):
        inputs = replay_inputs(model, mask[row : row + 1], 6, schedules[row])
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


# ---- replay: auto ----------------------------------------------------------------------------------------------


def test_auto_is_one_pass_on_a_cpu_and_stands_in_the_settings(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, rollout_batch_size=4)
    assert trainer.args.replay == "auto"
    trainer.train()
    assert trainer.engine_cache.engine is not None  # of a stated size, which stays in one pass
    assert trainer.replay == Replay(why="no GPU")
    assert trainer.settings["replay"] == "auto" and trainer.settings["replay_chosen"] == "one_pass (auto: no GPU)"
    assert not differences(trainer.settings, trainer.settings | {"replay_chosen": "segments"})


def test_auto_keeps_the_engine_where_a_step_has_room_beside_it(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, max_steps=1)
    monkeypatch.setattr(replays, "usable", lambda device: 1e12)
    trainer.train()
    need = trainer.step_beside_engine + trainer.engine_cache.nbytes
    assert trainer.engine_cache.nbytes > 0 and trainer.replay.kind == "one_pass"
    for room in (need, need - 1, None):
        monkeypatch.setattr(replays, "usable", lambda device, room=room: room)
        assert replays.engine_fits(trainer) == (room == need)
        assert rollout_engine_must_go(trainer, replays.engine_fits(trainer)) == (room != need)
    trainer.replay = Replay("segments")
    assert rollout_engine_must_go(trainer, fits=True), "segments are there for their memory"


def test_auto_is_settled_by_the_rank_with_the_least_memory(tmp_path, monkeypatch):
    """What a GPU has free is given here; the choice, and the training under it, are real."""
    trainer = trainer_for(tmp_path, max_steps=1, beta=0.1, rollout_batch_size=4)
    seen, score = [], GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda *args, batch_size=None, **rest: seen.append(batch_size) or score(*args, batch_size=batch_size, **rest),
    )
    monkeypatch.setattr(replays, "usable", lambda device: 1e12)
    assert replays.settled(trainer, 12).kind == "one_pass"
    monkeypatch.setattr(replays, "gather_object", lambda rooms: [*rooms, 0.0])
    trainer.train()
    assert (trainer.replay.kind, trainer.replay.offload) == ("segments", True)
    assert seen == [1]  # the reference scores sample by sample
    assert trainer.engine_cache.engine is None  # nor does the rollout's cache stay beside the segments
    assert max(logged(trainer, "mismatch/max")) < 1e-4 and logged(trainer, "kl")
    stated = trainer_for(tmp_path, replay="one_pass")
    assert replays.settled(stated, 12) == Replay()


@pytest.mark.parametrize("engine", [None, "ZeRO-2", "ZeRO-3", "FSDP1", "FSDP2"])
def test_auto_takes_segments_only_where_they_are_allowed(tmp_path, engine, monkeypatch):
    args = PteGRPOConfig(output_dir=str(tmp_path), window=8, replay="segments", use_cpu=True, report_to="none")
    try:
        check_engine(args, engine)
        allowed = True
    except ValueError:
        allowed = False
    model = with_pte(model_of(len(build_tokenizer())))
    assert (replays.segments_refused(args, engine, model) is None) == allowed
    dropping = with_pte(model_of(len(build_tokenizer())), dropout=0.1)
    assert "dropout in" in replays.segments_refused(args, None, dropping)


def test_an_adapter_to_start_from_is_not_its_own_reference(tmp_path):
    first = trainer_for(tmp_path, max_steps=1)
    first.train()
    first.save_model(str(tmp_path))
    model = PeftModel.from_pretrained(first.model.unload(), str(tmp_path), is_trainable=True)
    second = trainer_for(tmp_path, model=model, peft=False, beta=0.1)
    assert list(second.model.peft_config) == ["default"]
    second.train()
    assert logged(second, "kl")[0] > 0


def test_a_batch_without_spread_is_logged(tmp_path, caplog):
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [0.0] * len(completion_ids)]
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "every group has zero reward spread" in caplog.text


@pytest.mark.parametrize(
    "changes", [{}, {"beta": 0.1, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 4}], ids=["plain", "KL"]
)
def test_lora_keeps_the_full_cache_of_trl(tmp_path, changes):
    """`method="lora"` is a plain `trl.GRPOTrainer`: samples, losses and weights are equal bit by bit."""
    found = []
    for trainer_class in (PteGRPOTrainer, GRPOTrainer):
        torch.manual_seed(0)
        seen = []
        trainer = trainer_for(tmp_path, "lora", trainer_class=trainer_class, **changes)
        trainer.reward_funcs = [watched(seen)]
        trainer.train()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        names = ("loss", "grad_norm", "kl", "entropy", "reward")
        found.append((seen, {name: logged(trainer, name) for name in names}, weights))
        assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    ours, trls = found
    assert ours[0] == trls[0] and ours[1] == trls[1]
    assert ours[2].keys() == trls[2].keys() and all(torch.equal(w, trls[2][n]) for n, w in ours[2].items())
    assert not logged(trainer, "rollout/window")


def test_the_tiny_model_of_the_demo_is_supported(tmp_path):
    model, _ = build(0)
    trainer = trainer_for(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert max(logged(trainer, "mismatch/max")) < 1e-4


def test_encoders_are_calibrated_at_the_mean_eviction(tmp_path, monkeypatch):
    """Every prompt has a W of its own, and so an E."""
    seen, measure = [], calibrate.measure
    trainer = trainer_for(tmp_path, window="auto", evict_ratio=1.0)
    monkeypatch.setattr(calibrate, "measure", lambda *args, **options: seen.append(args) or measure(*args, **options))
    calibrate.calibrate_encoders(trainer)
    ((_, _, mask, evict),) = seen
    assert evict == round(mask.sum().item() / len(mask)) < mask.shape[1]
