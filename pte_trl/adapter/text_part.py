"""PEFT's adapters in a model that also sees or hears: kept to the part that writes, as PTE's are."""

import copy
import re

from peft import PeftConfig
from torch import nn

from pte_trl.adapter.peft_type import PTE


def text_only(adapter: PeftConfig, model: nn.Module) -> PeftConfig:
    """A configuration whose targets lie in the language model and its head alone.

    PEFT finds targets by the ends of their names, and encoders of images and sound often call theirs alike. A training
    on text gives those no gradient, and DDP ends a run over parameters without one.

    Args:
        adapter: of any PEFT method; a PteConfig is returned as it is, since PTE enters language models only.
        model: the base model, with or without memory.

    Returns:
        A copy whose `exclude_modules` names the other parts, too; `adapter` itself if the model has no other parts.
    """
    parts = _text_parts(model)
    if adapter.peft_type == PTE or not parts or not hasattr(adapter, "exclude_modules"):
        return adapter
    inside = "|".join(map(re.escape, parts))
    others = rf"(?!(?:{inside})(?:\.|$)).*"  # PEFT matches the whole name
    narrowed = copy.copy(adapter)
    narrowed.exclude_modules = "|".join([*_as_regex(adapter.exclude_modules), others])
    return narrowed


def _text_parts(model: nn.Module) -> list[str]:
    """Full names of the language model and of its head; empty where that is the whole model."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    wanted = [model.get_decoder(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is part for part in wanted)]
    return [] if "" in names else names


def _as_regex(excluded: list[str] | set[str] | str | None) -> list[str]:
    """PEFT's `exclude_modules`: one regular expression of whole names, or names and ends of names."""
    if not excluded:
        return []
    if isinstance(excluded, str):
        return [f"(?:{excluded})"]
    return [rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})"]
