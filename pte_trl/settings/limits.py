"""Types and ranges of settings: one table for every script and config class, checked by pydantic.

`check_values(settings)` compares each field of a dataclass with its annotation, or with what `LIMITS` says about it.
It runs first in `__post_init__`, before TRL and transformers compute with the values.
"""

import dataclasses
import enum
import json
import os
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

# Strict: true is no number, 2.5 no integer, 7 no text. NaN and infinity are no numbers, either.
CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Limit(NamedTuple):
    """What values a setting may have: a type for pydantic, and the same in words."""

    type: Any
    words: str


def _object(value):
    """A mapping, or the text of a JSON object, which TRL reads itself."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError as error:
            raise ValueError("not JSON") from error
    if not isinstance(found, dict):
        raise ValueError("no mapping")
    return value


def _pairs(value: str) -> str:
    """NAME=VALUE, NAME=VALUE: what transformers splits without a look."""
    for pair in value.split(","):
        name, equals, rest = pair.partition("=")
        if not (equals and name.strip() and rest.strip()) or "=" in rest:
            raise ValueError("no NAME=VALUE")
    return value


COUNT = Limit(Annotated[int, Field(ge=1)], "an integer of at least 1")
NATURAL = Limit(Annotated[int, Field(ge=0)], "an integer of at least 0")
POSITIVE = Limit(Annotated[float, Field(gt=0)], "a finite number above 0")
NOT_NEGATIVE = Limit(Annotated[float, Field(ge=0)], "a finite number of at least 0")
SHARE = Limit(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1")
BELOW_ONE = Limit(Annotated[float, Field(ge=0, lt=1)], "a number of at least 0 and below 1")
POSITIVE_SHARE = Limit(Annotated[float, Field(gt=0, le=1)], "a number above 0 and at most 1")
SEED = Limit(Annotated[int, Field(ge=0, lt=2**32)], "an integer from 0 to 4294967295")
PORT = Limit(Annotated[int, Field(ge=1, le=65535)], "a port, an integer from 1 to 65535")
PAIRS = Limit(Annotated[str, AfterValidator(_pairs)], "NAME=VALUE pairs with commas between them")
OBJECT = Limit(Annotated[Any, BeforeValidator(_object)], "a mapping, or the text of a JSON object")


def _range(values):
    """Two values, the smaller first."""
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError("no range")
    return values


def or_range(limit: Limit) -> Limit:
    """What a limit allows, or two such values between which a training draws, the smaller first."""
    pair = Annotated[list[limit.type] | tuple[limit.type, ...], AfterValidator(_range)]
    return Limit(limit.type | pair, f"{limit.words}, or two, the smaller first, to draw from")


def choice(*values: str) -> Limit:
    return Limit(Literal[values], "one of " + ", ".join(values))


WINDOWS = or_range(COUNT)
METHODS = ("pte", "lora", "lora_c")
LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
DTYPES = ("bfloat16", "float32", "float16", "auto")

# Every setting with a number in it is here, and every one that knows only some words (tests/test_limits.py).
LIMITS: dict[str, Limit] = {
    # transformers.TrainingArguments
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "max_steps": Limit(Literal[-1] | COUNT.type, "an integer of at least 1, or -1 for num_train_epochs"),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "adam_epsilon", "max_grad_norm"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BELOW_ONE),
    "optim_args": PAIRS,
    # `--fsdp` alone is true; transformers also takes the options of earlier versions, as text or a list of it.
    "fsdp": Limit(bool | str | list | None, "true or false, or the options of earlier versions as text"),
    "neftune_noise_alpha": NOT_NEGATIVE,
    "torch_empty_cache_steps": COUNT,
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), POSITIVE),
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": NATURAL,
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), NATURAL),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout"), COUNT),
    "local_rank": Limit(Annotated[int, Field(ge=-1)], "an integer of at least -1"),
    "log_level": choice("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": choice("debug", "info", "warning", "error", "critical", "passive"),
    "train_sampling_strategy": choice("random", "sequential", "group_by_length"),
    **dict.fromkeys(("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "liger_kernel_config"), OBJECT),
    "debug": Limit(str | list | None, "text, or a list of it"),  # annotated without the None that argparse gives it
    # trl.GRPOConfig and trl.DistillationConfig
    **dict.fromkeys(("model_init_kwargs", "teacher_model_init_kwargs"), OBJECT),
    **dict.fromkeys(("generation_kwargs", "chat_template_kwargs"), OBJECT),
    "transformers_continuous_batching_config": OBJECT,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "num_generations": Limit(Annotated[int, Field(ge=2)], "an integer of at least 2: rewards are compared in a group"),
    "num_generations_eval": COUNT,
    **dict.fromkeys(("max_completion_length", "generation_batch_size", "steps_per_generation"), COUNT),
    "pad_to_multiple_of": Limit(Literal["auto"] | COUNT.type, "auto, or an integer of at least 1"),
    "temperature": NOT_NEGATIVE,
    "top_p": POSITIVE_SHARE,
    "top_k": NATURAL,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "vllm_mode": choice("server", "colocate"),
    "vllm_model_impl": choice("vllm", "transformers"),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), PORT),
    "vllm_server_timeout": POSITIVE,
    "vllm_gpu_memory_utilization": POSITIVE_SHARE,
    **dict.fromkeys(("vllm_max_model_length", "vllm_tensor_parallel_size"), COUNT),
    "vllm_importance_sampling_mode": choice("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    **dict.fromkeys(
        ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
        NOT_NEGATIVE,
    ),
    "beta": NOT_NEGATIVE,
    "num_iterations": COUNT,
    **dict.fromkeys(("epsilon", "epsilon_high"), NOT_NEGATIVE),
    "delta": POSITIVE,
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), POSITIVE),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), NOT_NEGATIVE),
    "importance_sampling_level": choice("token", "sequence"),
    "multi_objective_aggregation": choice("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": Limit(bool | Literal["group", "batch", "none"], "group, batch, none, true or false"),
    "loss_type": choice(*LOSS_TYPES),
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "top_entropy_quantile": SHARE,
    **dict.fromkeys(("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"), NOT_NEGATIVE),
    "entropy_target": NOT_NEGATIVE,
    "max_tool_calling_iterations": NATURAL,
    "off_policy_mask_threshold": NOT_NEGATIVE,
    "num_completions_to_print": NATURAL,
    # ours
    "method": choice(*METHODS),
    "global_batch": COUNT,
    "window": Limit(Literal["auto", "full"] | WINDOWS.type, f"auto, full (method=lora), or {WINDOWS.words}"),
    "budget": Limit(Annotated[int, Field(ge=2)], "an integer of at least 2 (a prompt token and a thought token)"),
    "evict_ratio": or_range(POSITIVE_SHARE),
    "rollout_batch_size": Limit(Literal["auto"] | COUNT.type, "auto, or an integer of at least 1"),
    "compile_rollouts": choice("auto", "always", "never"),
    "replay": choice("auto", "one_pass", "segments"),
    "segment_length": COUNT,
    "distilled_tokens": choice("all", "after_eviction"),
    "dtype": choice(*DTYPES),
    **dict.fromkeys(("dataset_limit", "limit", "max_prompt_tokens", "rank", "num_global_tokens"), COUNT),
    **dict.fromkeys(("alpha", "init_ratio", "save_minutes"), POSITIVE),
    "adapter_dropout": BELOW_ONE,
    "state_update": choice("recursive", "sum"),
    "read": choice("row", "column"),
    "normalisation": choice("rms", "row"),
    "format_reward_weight": NOT_NEGATIVE,
    "grader_workers": COUNT,
    "grader_time_limit": POSITIVE,
    **dict.fromkeys(("max_new_tokens", "samples", "batch_size", "status_every"), COUNT),
    "backend": choice("transformers", "vllm"),
    "system_prompt_role": choice("system", "user"),
    "eval_temperature": NOT_NEGATIVE,
    "eval_top_p": POSITIVE_SHARE,
}


def check_values(settings, **limits: Limit) -> None:
    """Refuses the first field of a dataclass whose value is not of its type or out of its range.

    Args:
        limits: over those of `LIMITS`, where a class allows something else.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if fault := fault_of(type(settings), field.name, value, limits.get(field.name)):
            raise ValueError(fault)


def fault_of(cls: type, key: str, value, limit: Limit | None = None) -> str | None:
    """What is wrong with a value, in a sentence; None if nothing is."""
    hint = _hints(cls)[key]
    limit = limit or LIMITS.get(key)
    if limit is None:
        limit = Limit(_strict_enums(hint), _words(hint))
    elif _takes_none(hint):
        if value is None:
            return None
        limit = Limit(limit.type, f"{limit.words}, or left out")
    return _fault(key, value, limit)


def check_value(key: str, value, limit: Limit | None = None) -> None:
    """Refuses a value that is in no dataclass, such as a flag of argparse.

    Raises:
        ValueError: as `check_values`.
    """
    if fault := _fault(key, value, limit or LIMITS[key]):
        raise ValueError(fault)


def _fault(key: str, value, limit: Limit) -> str | None:
    try:
        _adapter(limit.type).validate_python(value)
    except ValidationError:
        shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "…"
        return f"{key}={shown}: must be {limit.words}"
    return None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _adapter(kind) -> TypeAdapter:
    return TypeAdapter(kind, config=CONFIG)


def _arms(hint) -> tuple:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _takes_none(hint) -> bool:
    return type(None) in _arms(hint)


def _is_enum(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _strict_enums(hint):
    """`SchedulerType | str` means a member or its name, not any text."""
    names = [kind for kind in _arms(hint) if _is_enum(kind)]
    if not names:
        return hint
    return typing.Union[tuple(Literal[tuple(m.value for m in kind)] | kind for kind in names)]  # noqa: UP007


def _words(hint) -> str:
    """An annotation in words."""
    names = [member.value for kind in _arms(hint) if _is_enum(kind) for member in kind]
    if names:
        return "one of " + ", ".join(names)
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "left out"}
    said = [plain.get(kind) or _container(kind) for kind in sorted(_arms(hint), key=lambda kind: kind is type(None))]
    return ", or ".join(dict.fromkeys(said))


def _container(kind) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is list:
        inside = typing.get_args(kind)
        return f"a list of {' or '.join(getattr(k, '__name__', str(k)) for k in inside)}" if inside else "a list"
    if origin is dict:
        return "a mapping"
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return getattr(origin, "__name__", str(origin))
