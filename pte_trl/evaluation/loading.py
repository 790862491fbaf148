"""A model and its adapter for sampling, checked before the weights load."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pte_trl.adapter.check import check_adapter_folder, load_adapter
from pte_trl.adapter.config import one_of
from pte_trl.adapter.files import adapter_folder
from pte_trl.adapter.fit import check_supported
from pte_trl.cache.masks import MASKED_ATTENTION
from pte_trl.data.needs import model_needs
from pte_trl.evaluation.config import ModelSource
from pte_trl.models.attention import usable_attention
from pte_trl.models.hub import reachable
from pte_trl.models.loading import check_base, load_base


def check_evaluation_model(args: ModelSource) -> None:
    """The same for a model to sample from.

    Raises:
        ValueError: an unsupported architecture, a model folder or an adapter that is not whole, or not the model's.
    """
    reachable(*model_needs(args))
    one_of("attn_implementation", args.attn_implementation, MASKED_ATTENTION)
    config = check_base(args.model_name_or_path, args.trust_remote_code)
    args.attn_implementation = usable_attention(args.attn_implementation, config)
    # Without an adapter, and with LoRA; PTE's own is looked at with its folder.
    check_supported(config, "lora_c", attention=args.attn_implementation)
    if args.adapter is not None:
        args.adapter = str(adapter_folder(args.adapter))
        check_adapter_folder(args.adapter, config, args.trust_remote_code)


def load_for_evaluation(args: ModelSource, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model with its adapter, for sampling only."""
    model = load_base(args, args.trust_remote_code)
    if args.adapter is not None:
        model = load_adapter(model, args.adapter)
    return model.to(device).eval()
