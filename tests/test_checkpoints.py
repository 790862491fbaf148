"""Checkpoints of a training beside evaluations, signals, the hub and later epochs."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl import PteConfig, PteGRPOConfig, PteGRPOTrainer


def problems(number: int) -> Dataset:
    some = rows("train", number, 0, DIFFICULTIES["easy"])
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": row["problem"]}] for row in some]})


class Reward:
    """In training a number per completion; in an evaluation less at every step, so that the first is the best.

    `seen` has the step and the prompts of every rollout in training.
    """

    __name__ = "reward"

    def __init__(self):
        self.trainer, self.seen = None, []

    def __call__(self, prompts, completions, **kwargs):
        step = self.trainer.state.global_step
        if not self.trainer.model.training:
            return [10.0 - step] * len(completions)
        self.seen.append((step, {prompt[0]["content"] for prompt in prompts}))
        return [float(place) for place in range(len(completions))]


def grpo(folder: Path, train: int = 8, evaluated: Dataset | None = None, **changes) -> PteGRPOTrainer:
    model, tokenizer = build(seed=0)
    settings = {
        "output_dir": str(folder),
        "window": 8,
        "max_completion_length": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    reward = Reward()
    trainer = PteGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=PteGRPOConfig(**settings | changes),
        train_dataset=problems(train),
        eval_dataset=evaluated,
        peft_config=PteConfig(rank=4, num_global_tokens=4),
        processing_class=tokenizer,
    )
    reward.trainer, trainer.seen = trainer, reward.seen
    return trainer


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward"}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_kept_and_loaded(limit, tmp_path):
    """The first of three steps is the best."""
    settings = EVALUATED | {"load_best_model_at_end": True, "save_total_limit": limit, "learning_rate": 1e-2}
    trainer = grpo(tmp_path, evaluated=problems(1), max_steps=3, **settings)
    trainer.train()
    best_folder = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best_folder)
    trainer.save_model(str(tmp_path / "end"))
    end, best = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("end", "checkpoint-1"))
    assert all(torch.equal(tensor, best[name]) for name, tensor in end.items())
    last = tmp_path / "checkpoint-3"
    assert last.exists() is (limit == 2)  # transformers deletes it where one is to be left
    if limit == 2:
        assert json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best_folder)
        tensors = load_file(last / "adapter_model.safetensors")
        assert not all(torch.equal(tensor, tensors[name]) for name, tensor in end.items())


def test_a_run_resumed_in_a_later_epoch_sees_the_same_prompts(tmp_path):
    """Five prompts, one a step: step 7 is in the second epoch, step 10 begins the third."""
    whole = grpo(tmp_path, train=5, max_steps=12)
    whole.train()
    orders = [[prompts for _, prompts in whole.seen[at : at + 5]] for at in (0, 5)]
    assert orders[0] != orders[1]
    for step in (7, 10, 3):
        resumed = grpo(tmp_path, train=5, max_steps=12)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.seen == whole.seen[step:], step


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_although_the_step_is_not_the_best(tmp_path):
    settings = EVALUATED | {"eval_steps": 2, "save_strategy": "best"}
    trainer = grpo(tmp_path, evaluated=problems(1), max_steps=8, **settings)
    trainer.add_callback(Terminate())
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_resumed_run_saves_logs_and_evaluates_as_it_is_asked_to(tmp_path):
    grpo(tmp_path, max_steps=2, save_steps=2, logging_steps=2).train()
    trainer = grpo(tmp_path, evaluated=problems(1), max_steps=6, **EVALUATED | {"eval_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(2, 7)}
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history if "eval_reward" in entry] == [4, 6]


class Hub:
    """Lists what it is given at once and reads it when the training has ended, as uploads in the background may."""

    def __init__(self):
        self.listed: list[tuple[str | None, list[Path]]] = []

    def upload_folder(self, *, folder_path, path_in_repo=None, **kwargs):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.listed.append((path_in_repo, files))
        return ThreadPoolExecutor(1).submit(lambda: None)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_what_is_pushed_is_there_when_it_is_read(strategy, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(PteGRPOTrainer, "init_hf_repo", lambda self, token=None: None)
    trainer = grpo(tmp_path, max_steps=2, push_to_hub=True, hub_strategy=strategy, hub_always_push=True)
    trainer.hub_model_id, trainer.push_in_progress = "org/model", None
    trainer.train()
    pushed = [files for path_in_repo, files in hub.listed if path_in_repo is not None]
    assert len(hub.listed) == (2 if strategy == "every_save" else 4)
    gone = {path.name for _, files in hub.listed for path in files if not path.exists()}
    assert gone == {".owner"}  # until the end of the training, when transformers has waited for the uploads
    if strategy != "every_save":
        assert len(pushed) == 2 and all(any("adapter_model" in path.name for path in files) for files in pushed)


def test_an_evaluated_prompt_that_fills_the_budget_is_refused_before_training(tmp_path):
    (row,) = problems(1)["prompt"]
    long = Dataset.from_dict({"prompt": [[row[0] | {"content": 4 * row[0]["content"]}]]})
    settings = {"window": None, "budget": 48, "eval_strategy": "steps", "eval_steps": 3}
    trainer = grpo(tmp_path, evaluated=long, max_steps=4, **settings)
    with pytest.raises(ValueError, match="budget=48: nothing is left for the thought"):
        trainer.train()
    assert trainer.seen == []


def test_completions_that_are_masked_still_count_where_they_cost(tmp_path):
    """Under `mask_truncated_completions` a cut completion is not learnt from, but it was sampled and scored."""
    logs = []
    for masked in (False, True):
        settings = {"max_steps": 1, "max_completion_length": 24, "save_strategy": "no"}
        trainer = grpo(tmp_path / str(masked), mask_truncated_completions=masked, **settings)
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    one, other = logs
    assert one["completions/clipped_ratio"] > 0
    for name in ("attention/tflops_max", "completions/format_rate", "completions/clipped_ratio"):
        assert one[name] == other[name], name
