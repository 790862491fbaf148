"""The model and the adapter that a trainer of this project is given, looked at before TRL loads or wraps them."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import CONFIG_NAME, AutoConfig

from pte_trl.adapter.check import active_config, check_adapter
from pte_trl.adapter.fit import check_geometry, check_supported
from pte_trl.adapter.settings import one_of
from pte_trl.cache.masks import MASKED_ATTENTION
from pte_trl.compat.peft import CONFIG_NAME as ADAPTER_FILE
from pte_trl.compat.transformers import attention_of

LOADED = "PeftModel.from_pretrained(model, FOLDER, is_trainable=True)"


def check_given(settings, model: Any, peft_config: Any) -> None:
    """Refuses a model and an adapter that do not fit the method, or that would train nothing.

    Args:
        settings: the trainer's config.
        model: a name or folder, or a model with or without an adapter.
        peft_config: of the adapter to be made; None where the model has one, or where `lora` trains it whole.

    Raises:
        ValueError: in one sentence, with what was given and what is allowed.
    """
    method = settings.method
    if not isinstance(model, (str, nn.Module)):
        raise ValueError(f"model={_kind(model)}: must be a hub name, a folder or a model")
    if not (peft_config is None or isinstance(peft_config, PeftConfig)):
        raise ValueError(f"peft_config={_kind(peft_config)}: must be a PteConfig, a LoraConfig or another PeftConfig")
    if isinstance(model, str):
        _check_folder(model)
        found, source = peft_config, "peft_config"
    else:
        found, source = _check_model(settings, model, peft_config)
    check_adapter(method, found, source=source)
    if method != "lora":
        _check_bounded(settings, model, found)


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


def _check_bounded(settings, model: str | nn.Module, adapter: PeftConfig) -> None:
    """What a decode with evictions and its replay can do, of the model's configuration."""
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        attention = attention_of(config)
    else:
        options = settings.model_init_kwargs or {}
        known = {key: options[key] for key in ("revision", "trust_remote_code", "token") if key in options}
        config = AutoConfig.from_pretrained(model, **{"trust_remote_code": settings.trust_remote_code} | known)
        attention = options.get("attn_implementation")
    check_supported(config)
    if attention is not None:
        one_of("attn_implementation", attention, MASKED_ATTENTION)
    if hasattr(adapter, "geometry"):
        check_geometry(adapter, config)
