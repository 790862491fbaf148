"""Checks of what a trainer is given, before TRL loads or wraps the model: model, adapter, data."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import CONFIG_NAME, AutoConfig

from pte_trl.adapter import PteConfig
from pte_trl.adapter.check import active_config, check_adapter, expected_shapes
from pte_trl.adapter.fit import check_geometry, check_supported
from pte_trl.adapter.settings import one_of
from pte_trl.cache.masks import MASKED_ATTENTION
from pte_trl.compat.peft import CONFIG_NAME as ADAPTER_FILE
from pte_trl.compat.transformers import attention_of
from pte_trl.data.needs import repository
from pte_trl.models.attention import usable_attention
from pte_trl.models.hub import reachable
from pte_trl.models.weights import check_model_folder, read_config
from pte_trl.replay.attention import NAME
from pte_trl.rewards.functions import AccuracyReward
from pte_trl.rewards.grader import Grader, check_golds
from pte_trl.runtime.together import on_main
from pte_trl.runtime.trained import check_enough
from pte_trl.training.router import check_whole

LOADED = "PeftModel.from_pretrained(model, FOLDER, is_trainable=True)"
DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_given(settings, model: Any, peft_config: Any):
    """Refuses a model and an adapter that do not fit the method, or that would train nothing.

    Args:
        settings: the trainer's config.
        model: a name or folder, or a model with or without an adapter.
        peft_config: of the adapter to be made; None where the model has one, or where `lora` trains it whole.

    Returns:
        The configuration of a model given by name, None for a model.

    Raises:
        ValueError: in one sentence, with what was given and what is allowed.
        OSError: the hub has no such model, or it cannot be reached and the model is not in the local cache.
    """
    method = settings.method
    if not isinstance(model, (str, nn.Module)):
        raise ValueError(f"model={_kind(model)}: must be a hub name, a folder or a model")
    if not (peft_config is None or isinstance(peft_config, PeftConfig)):
        raise ValueError(f"peft_config={_kind(peft_config)}: must be a PteConfig, a LoraConfig or another PeftConfig")
    if peft_config is not None and peft_config.inference_mode:
        raise ValueError("peft_config.inference_mode=True: nothing of the adapter would be trained; allowed is False")
    if not isinstance(model, str):
        _check_tokens(settings, peft_config, getattr(model, "config", None))
        found, source = _check_model(settings, model, peft_config)
        check_adapter(method, found, source=source)
        if method != "lora":
            config = getattr(model, "config", None)
            _check_bounded(settings, config, attention_of(config), found)
        return None
    _check_folder(model)
    check_adapter(method, peft_config, source="peft_config")
    options = settings.model_init_kwargs or {}
    config = named_config(model, settings.trust_remote_code, options, method)
    _check_tokens(settings, peft_config, config)
    if method != "lora":
        attention = options.get("attn_implementation") or usable_attention(NAME, config, quiet=True)
        _check_bounded(settings, config, attention, peft_config)
    if isinstance(peft_config, (PteConfig, LoraConfig)) and loaded_here(settings.method, config):
        check_targets(method, peft_config, config, settings.trust_remote_code, key="peft_config.target_modules")
    return config


def check_reward_models(rewards: Any) -> None:
    """Reward models that are given by name can be had.

    Raises:
        OSError, ValueError: as `hub.reachable`.
    """
    names = [each for each in (rewards if isinstance(rewards, (list, tuple)) else [rewards]) if isinstance(each, str)]
    hubs = [repository("model", "reward_funcs", name) for name in names]
    reachable(*(hub for hub in hubs if hub is not None))


def check_data(settings, dataset: Any, rewards: Any = None, evaluated: Any = None) -> None:
    """Refuses data with a missing column or an unreadable gold answer, and too few rows for a generation batch.

    Streamed data are not checked: their columns, length and rows are not known. Gold answers are checked where an
    `AccuracyReward` reads them, by its own grader, which checks each distinct answer once.

    Args:
        dataset: to train on.
        rewards: a reward function, or a list of them.
        evaluated: `eval_dataset`, one or several by their names.

    Raises:
        ValueError: naming the argument and the columns, both numbers, or column, row and value of the first bad
            answers.
    """
    if settings.eval_strategy != "no" and evaluated is None:
        raise ValueError(
            f"eval_dataset=None: eval_strategy={settings.eval_strategy.value!r} evaluates on one; give it, or allowed "
            "is eval_strategy no"
        )
    sets = evaluated.items() if isinstance(evaluated, dict) else [(None, evaluated)]
    named = {"eval_dataset" if name is None else f"eval_dataset[{name!r}]": rows for name, rows in sets}
    for name, rows in ({"train_dataset": dataset} | named).items():
        if isinstance(rows, Dataset):
            _check_rows(name, rows, rewards)
    if isinstance(dataset, Dataset):
        check_enough(settings, len(dataset))


def _check_rows(name: str, dataset: Dataset, rewards: Any) -> None:
    rewards = rewards if isinstance(rewards, (list, tuple)) else [rewards]
    graders = [each.grader for each in rewards if isinstance(each, AccuracyReward)]
    needed = {"prompt": "the trainer"} | ({"answer": "AccuracyReward"} if graders else {})
    for column, reader in needed.items():
        if column not in dataset.column_names:
            raise ValueError(f"{name}: has the columns {dataset.column_names}; {reader} reads the column {column!r}")
    for grader in graders:
        on_main(lambda grader=grader: _check_answers(name, dataset, grader))


def _check_answers(name: str, dataset: Dataset, grader: Grader) -> None:
    columns = [column for column in ("id", "answer") if column in dataset.column_names]
    try:
        check_golds(dataset.select_columns(columns).with_format(None), grader=grader)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def loaded_here(method: str, config) -> bool:
    """Whether a model given by name is loaded as a recipe loads it. What only `lora` trains is left to TRL."""
    if method != "lora":
        return True
    try:
        check_supported(config, "lora_c", attention=usable_attention(NAME, config, quiet=True))
    except ValueError:
        return False
    return True


def named_config(name: str, trust_remote_code: bool, options: dict, method: str):
    """The configuration of a model given by name, whose files are looked at where they are here.

    Args:
        options: TRL's `model_init_kwargs`.
        method: of the training; only where this project loads the model, its folder is looked at.

    Raises:
        ValueError, OSError: as `check_given`.
    """
    if (hub := repository("model", "model", name)) is not None:
        reachable(hub)
    dtype = options.get("dtype")
    if not isinstance(dtype, torch.dtype):
        one_of("model_init_kwargs.dtype", dtype, (None, *DTYPES))
    known = {key: options[key] for key in ("revision", "trust_remote_code", "token") if key in options}
    known = {"trust_remote_code": trust_remote_code} | known
    if hub is None:
        config = read_config(Path(name), f"model={name!r}", known["trust_remote_code"])
        if loaded_here(method, config):
            check_model_folder(name, known["trust_remote_code"], key="model")
        return config
    return AutoConfig.from_pretrained(name, **known)


def check_targets(
    method: str, adapter: PeftConfig, config, trust_remote_code: bool, key: str = "target_modules"
) -> None:
    """Builds the adapter on a model without memory, so that a name that is no linear of it is found now.

    Raises:
        ValueError: with the names.
    """
    try:
        expected_shapes(adapter, config, trust_remote_code, text_alone=method != "lora")
    except (ValueError, AttributeError) as error:
        names = adapter.target_modules
        shown = sorted(names) if isinstance(names, (set, list, tuple)) else names
        raise ValueError(f"{key}={shown!r}: {' '.join(str(error).split())}") from error


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _check_folder(name: str) -> None:
    folder = Path(name)
    if (folder / ADAPTER_FILE).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"model={name!r}: is the folder of an adapter; give its base model with it, {LOADED}")
    if not folder.is_dir() and folder.is_absolute():
        raise ValueError(f"model={name!r}: there is no such folder")


def _check_model(settings, model: nn.Module, peft_config: PeftConfig | None) -> tuple[PeftConfig | None, str]:
    """The adapter that would be trained, and what to call it."""
    there = list(getattr(model, "peft_config", None) or {})
    if there and not isinstance(model, PeftModel):
        raise ValueError(
            f"model={_kind(model)}: transformers has put the adapters {there} into it, which TRL would not train; "
            f"give {LOADED}"
        )
    if there and peft_config is not None:
        raise ValueError(
            f"peft_config={_kind(peft_config)}: the model has the adapters {there} already; give one only"
        )
    if peft_config is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model={_kind(model)}: nothing in it is trainable; an adapter is if it comes by {LOADED}")
    if not there:
        return peft_config, "peft_config"
    if getattr(settings, "num_generations", None) and settings.beta and "default" not in there:
        raise ValueError(
            f"beta={settings.beta}: TRL looks for an adapter called 'default' then, and the model's are {there}; "
            "load it under that name"
        )
    return active_config(model), "the model's adapter"


def _check_tokens(settings, adapter: PeftConfig | None, config) -> None:
    """GRPO's loss reads weight and bias of the head, which PEFT wraps with the embeddings that are tied to it."""
    tokens = getattr(adapter, "trainable_token_indices", None)
    if tokens and hasattr(settings, "num_generations") and getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            f"peft_config.trainable_token_indices={tokens!r}: this model's head is tied to its embeddings, and TRL's "
            "loss cannot read a head with an adapter; allowed are models with a head of their own, or modules_to_save"
        )


def _check_bounded(settings, config, attention: str | None, adapter: PeftConfig) -> None:
    """What a decode with evictions and its replay can do, of the model's configuration."""
    if attention is not None:
        one_of("attn_implementation", attention, MASKED_ATTENTION)
    pte = adapter if isinstance(adapter, PteConfig) else None
    check_supported(config, settings.method, pte, attention)
    if getattr(settings, "replay", None) == "segments":
        check_whole(settings, config)
    if tokens := getattr(adapter, "alora_invocation_tokens", None):
        raise ValueError(
            f"alora_invocation_tokens={tokens!r}: such an adapter looks for its tokens in every call of the model, "
            "and a decode feeds one token a call, so it would be off there and on in training; allowed is None, or "
            "method=lora"
        )
    if hasattr(adapter, "geometry"):
        check_geometry(adapter, config)
