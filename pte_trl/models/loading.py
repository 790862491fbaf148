"""The base model, checked and loaded."""

from typing import Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pte_trl.models.generation_config import neutral_generation_config
from pte_trl.models.weights import check_loaded, check_model_folder


class Source(Protocol):
    """A recipe or an evaluation, as far as loading its base model goes."""

    model_name_or_path: str
    dtype: str
    attn_implementation: str | None


def check_base(name: str, trust_remote_code: bool):
    """The configuration of the base model, whose folder must be whole."""
    check_model_folder(name, trust_remote_code)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_base(source: Source, trust_remote_code: bool) -> PreTrainedModel:
    """The base model with all of its weights.

    Raises:
        ValueError: some are missing, or of other shapes than the configuration says.
    """
    return load_weights(
        source.model_name_or_path,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def load_weights(name: str, key: str = "model_name_or_path", **options) -> PreTrainedModel:
    """A causal language model with all of its weights.

    Args:
        key: the setting that names it, for errors.
        options: of `from_pretrained`; a dtype may be given by its name.

    Raises:
        ValueError: as `load_base`.
    """
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    check_loaded(found, name, key)
    # A checkpoint's own sampling settings would change what TRL's `generate` samples, for `lora` alone.
    model.generation_config = neutral_generation_config(model)
    quiet_router(model)
    return model


def quiet_router(model: PreTrainedModel) -> None:
    """The model returns the router logits of its experts where it is asked for them alone.

    A configuration that asks for them always has every decoded token compute the load-balancing loss, with a mask that
    does not fit. A training asks for them where its loss needs them.
    """
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False
