"""Types and ranges: every setting of every script and config class, with values that it must refuse."""

import dataclasses
import math

import pytest

from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.evaluation.generate import GenerateArguments
from pte_trl.settings.limits import LIMITS, _arms, _hints, fault_of
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillConfig
from pte_trl.training.distill.script import DistillArguments

CLASSES = (RecipeArguments, PteGRPOConfig, PteDistillConfig, DistillArguments, EvaluationArguments, GenerateArguments)
FIELDS = [(cls, field) for cls in CLASSES for field in dataclasses.fields(cls)]
ODD = (object(), [[1]], math.nan, math.inf, -math.inf, "no such word", -7, 10**12, True, 2.5, {1: 2}, b"")


def default_of(field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def name(value) -> str:
    return value.__name__ if isinstance(value, type) else getattr(value, "name", "")


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=name)
def test_a_default_passes_and_nonsense_does_not(cls, field):
    if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
        assert fault_of(cls, field.name, default_of(field)) is None
    refused = [value for value in ODD if fault_of(cls, field.name, value)]
    assert ODD[0] in refused
    assert any(value is ODD[2] for value in refused), "NaN passes"
    for value in refused:
        sentence = fault_of(cls, field.name, value)
        assert sentence.startswith(f"{field.name}=") and ": must be " in sentence
        assert "\n" not in sentence


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=name)
def test_every_number_has_a_range(cls, field):
    """A number of an upgrade fails here until its range is in the table."""
    if {int, float} & set(_arms(_hints(cls)[field.name])):
        assert field.name in LIMITS


def test_the_table_has_no_key_that_is_not_there():
    assert not set(LIMITS) - {field.name for _, field in FIELDS} - {"geometry"}


OUT_OF_RANGE = {
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "num_generations": 0,
    "max_steps": 0,
    "max_completion_length": 0,
    "learning_rate": math.nan,
    "beta": -0.1,
    "epsilon": -0.1,
    "seed": -1,
    "num_train_epochs": 0.0,
    "lr_scheduler_type": "linar",
    "optim": "adam",
    "save_strategy": "often",
    "chat_template_kwargs": "[1]",
    "optim_args": "foo",
    "evict_ratio": 0.0,
    "window": 0,
    "rollout_batch_size": "many",
    "compile_rollouts": "true",
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_python_user_meets_the_same_sentence(tmp_path, key):
    with pytest.raises(ValueError, match=rf"^{key}=.*: must be "):
        PteGRPOConfig(**{"output_dir": str(tmp_path), "window": 8, "use_cpu": True, key: OUT_OF_RANGE[key]})


@pytest.mark.parametrize("options", [{"torch_dtype": "bfloat16"}, '{"torch_dtype": "bfloat16"}'], ids=type)
def test_an_earlier_name_of_dtype_counts(tmp_path, options):
    args = PteGRPOConfig(output_dir=tmp_path, window=8, use_cpu=True, bf16=False, model_init_kwargs=options)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


def test_a_folder_may_be_a_path(tmp_path):
    args = PteGRPOConfig(output_dir=tmp_path, window=8, use_cpu=True, bf16=False, report_to="none")
    assert str(args.output_dir) == str(tmp_path)
