"""Every field of the trainers' configs and every argument of the trainers works or is refused (settings_table.py)."""

import dataclasses
import inspect
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationTrainer, GRPOConfig, GRPOTrainer

from experiments.tiny.model import build_tokenizer
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.training.trainer import PteGRPOTrainer
from pte_trl.training.unsupported import ARGUMENTS, SETTINGS
from tests import settings_table as table
from tests.test_trainer import PROBLEMS, model_of, reward_of_length

METHODS = ("pte", "lora_c", "lora")
STUDENTS = ("pte", "lora_c")


def settings(tmp_path, method: str, **changes) -> dict:
    base = {
        "output_dir": str(tmp_path),
        "method": method,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return base | ({} if method == "lora" else {"window": 6}) | changes


def grpo(tmp_path, method: str = "pte", arguments: dict | None = None, **changes) -> PteGRPOTrainer:
    tokenizer, script = build_tokenizer(), RecipeArguments("unused", rank=4, num_global_tokens=4)
    args = PteGRPOConfig(**settings(tmp_path, method, **{"num_generations": 2} | changes))
    given = {
        "model": model_of(len(tokenizer)),
        "reward_funcs": reward_of_length,
        "args": args,
        "train_dataset": prompts(),
        "eval_dataset": prompts().select(range(2)),
        "processing_class": tokenizer,
        "peft_config": script.adapter_config(method),
    }
    return PteGRPOTrainer(**given | (arguments or {}))


def distill(tmp_path, method: str = "pte", arguments: dict | None = None, **changes) -> PteDistillationTrainer:
    tokenizer, script = build_tokenizer(), RecipeArguments("unused", rank=4, num_global_tokens=4)
    given = {
        "model": model_of(len(tokenizer)),
        "args": PteDistillConfig(**settings(tmp_path, method, **changes)),
        "train_dataset": prompts(),
        "eval_dataset": prompts().select(range(2)),
        "processing_class": tokenizer,
        "peft_config": script.adapter_config(method),
    }
    return PteDistillationTrainer(**given | (arguments or {}))


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROBLEMS]})


def logged(trainer, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def trained(trainer) -> None:
    """It trains every tensor that has an effect, and under a bounded method on what was sampled."""
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    trainer.train()
    args = trainer.args
    assert trainer.state.global_step == trainer.state.max_steps > 0
    nothing_left = getattr(args, "mask_truncated_completions", False)  # all completions here are cut
    norms = logged(trainer, "grad_norm")
    assert all(map(math.isfinite, norms)) and (max(norms, default=1.0) > 0) != nothing_left
    if sum(norm > 0 for norm in norms) > 1 and not args.load_best_model_at_end:  # the first step moves `up` alone
        assert not [name for name, p in trainable.items() if torch.equal(p, before[name])]
    if args.method != "lora" and isinstance(trainer, PteGRPOTrainer):
        worst = logged(trainer, "mismatch/max")
        assert worst or nothing_left
        assert max(worst, default=0.0) < (0.1 if args.bf16 else 1e-4)


# ---- every field is in the table -------------------------------------------------------------------------------


def classed(runs: dict) -> set[str]:
    needs = {key for keys in table.NEEDS.values() for key in keys}
    refused = {*table.REFUSED, *table.REFUSED_ALWAYS}
    return {key for run in runs.values() for key in run} | needs | refused | {*table.BY_EVERY_RUN}


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        (PteGRPOConfig, table.GRPO_RUNS | table.BOUNDED_RUNS),
        (PteDistillConfig, table.DISTILL_RUNS | table.BOUNDED_RUNS),
    ],
    ids=["GRPO", "distillation"],
)
def test_every_field_is_in_the_table(config, runs):
    names = {field.name for field in dataclasses.fields(config)}
    assert not names - classed(runs), "run it with another value, or refuse it"


def test_the_table_names_no_field_that_is_not_there():
    names = {field.name for config in (PteGRPOConfig, PteDistillConfig) for field in dataclasses.fields(config)}
    assert not classed(table.GRPO_RUNS | table.DISTILL_RUNS | table.BOUNDED_RUNS) - names
    assert set(SETTINGS) <= set(table.REFUSED)


def test_every_run_has_values_that_are_not_the_defaults():
    fields = {f.name: f for config in (PteDistillConfig, PteGRPOConfig) for f in dataclasses.fields(config)}
    for run in (*table.GRPO_RUNS.values(), *table.BOUNDED_RUNS.values()):
        same = [key for key, value in run.items() if fields[key].default == value]
        assert not set(same) - {"max_steps", "window", "report_to", "save_strategy"}, same


# ---- what works ------------------------------------------------------------------------------------------------


def cells():
    """Every run with both methods; by turns, one of the two always runs."""
    for number, run in enumerate(table.GRPO_RUNS):
        for method in STUDENTS:
            always = method == STUDENTS[number % 2]
            yield pytest.param(method, run, marks=[] if always else [pytest.mark.thorough], id=f"{run}-{method}")


@pytest.mark.parametrize(("method", "run"), cells())
def test_a_grpo_training_with_other_values(tmp_path, method, run):
    trained(grpo(tmp_path, method, **table.GRPO_RUNS[run]))


# `lora` is TRL untouched: what goes together is run together.
TOGETHER = (("optimizer", "precision", "checkpointing", "logging", "entropy"), ("data", "evaluation"))
ALONE = ("sapo", "off policy", "vespo", "truncated", "memory")


@pytest.mark.parametrize("runs", [*TOGETHER, *((run,) for run in ALONE)], ids=" ".join)
def test_lora_trains_with_other_values(tmp_path, runs):
    trained(grpo(tmp_path, "lora", **{key: value for run in runs for key, value in table.GRPO_RUNS[run].items()}))


def test_lora_runs_all():
    assert {run for runs in TOGETHER for run in runs} | {*ALONE} == set(table.GRPO_RUNS)


@pytest.mark.parametrize("method", STUDENTS)
@pytest.mark.parametrize("run", table.BOUNDED_RUNS)
def test_a_bounded_training_with_other_values(tmp_path, method, run):
    trained(grpo(tmp_path, method, **table.BOUNDED_RUNS[run]))


@pytest.mark.parametrize("run", [run for run in table.DISTILL_RUNS if run != "memory"])
def test_a_distillation_with_other_values(tmp_path, run):
    names = {field.name for field in dataclasses.fields(PteDistillConfig)}
    changes = {key: value for key, value in table.DISTILL_RUNS[run].items() if key in names}
    trained(distill(tmp_path, STUDENTS[len(run) % 2], **changes))


# ---- what is refused -------------------------------------------------------------------------------------------


def value_of(key: str):
    if key == "parallelism_config":
        from accelerate import ParallelismConfig

        return ParallelismConfig()
    return table.REFUSED[key]


@pytest.mark.parametrize("method", STUDENTS)
@pytest.mark.parametrize("key", table.REFUSED)
def test_a_bounded_method_refuses(tmp_path, method, key):
    owners = [
        config
        for config in (PteGRPOConfig, PteDistillConfig)
        if key in {field.name for field in dataclasses.fields(config)}
    ]
    for config in owners:
        with pytest.raises(ValueError, match=rf"(?s)^{key}=.*method={method} allows only"):
            config(**settings(tmp_path, method, **{key: value_of(key)}))


@pytest.mark.parametrize("key", table.REFUSED_ALWAYS)
def test_every_method_refuses(tmp_path, key):
    value, sentence = table.REFUSED_ALWAYS[key]
    for method in METHODS:
        with pytest.raises(ValueError, match=sentence):
            grpo(tmp_path, method, **{key: value}, save_strategy="steps")


# ---- arguments of the trainers ---------------------------------------------------------------------------------


class Silent(TrainerCallback):
    """A callback of a user."""


def other_tool(x: int) -> int:
    """A tool.

    Args:
        x: a number.
    """
    return x


REFUSED_ARGUMENTS = {
    "tools": [other_tool],
    "rollout_func": other_tool,
    "environment_factory": Silent,
    "quantization_config": "a config",
    "teacher_model": "a/teacher",
}


def given_otherwise(tmp_path) -> dict[str, dict]:
    """Every argument that works, in a way that the other tests do not use."""
    model, tokenizer = model_of(len(build_tokenizer())), build_tokenizer()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return {
        "model": {"model": str(folder)},
        "processing_class": {"model": str(folder), "processing_class": None},
        "train_dataset": {"train_dataset": Dataset.from_dict({"prompt": PROBLEMS})},  # plain text
        "eval_dataset": {"eval_dataset": {"one": prompts().select(range(2))}},
        "callbacks": {"callbacks": [Silent()]},
        "optimizers": {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))},
        "reward_funcs": {"reward_funcs": [reward_of_length, reward_of_length]},
        "reward_processing_classes": {"reward_processing_classes": [None, None]},
    }


BY_EVERY_TEST = {"self", "args", "peft_config"}


@pytest.mark.parametrize(("trainer", "make"), [(GRPOTrainer, grpo), (DistillationTrainer, distill)])
def test_every_argument_of_a_trainer_works_or_is_refused(tmp_path, trainer, make):
    names = set(inspect.signature(trainer.__init__).parameters)
    others = given_otherwise(tmp_path)
    assert names <= {*REFUSED_ARGUMENTS, *others, *BY_EVERY_TEST}
    assert set(ARGUMENTS) == set(REFUSED_ARGUMENTS)
    together = {"callbacks", "eval_dataset", "reward_funcs", "reward_processing_classes", "train_dataset", "model"}
    for keys in (together, *({key} for key in set(others) - together)):
        arguments = {name: value for key in keys & names for name, value in others[key].items()}
        trained(make(tmp_path, arguments=arguments, max_steps=1))
    for key in names & set(REFUSED_ARGUMENTS):
        with pytest.raises(ValueError, match=rf"^{key}=.*method=lora_c allows only None, since"):
            make(tmp_path, "lora_c", arguments={key: REFUSED_ARGUMENTS[key]})


def test_a_config_of_trl_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="args=GRPOConfig: must be a PteGRPOConfig"):
        grpo(tmp_path, arguments={"args": GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)})
