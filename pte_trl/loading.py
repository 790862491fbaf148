"""A recipe's model, tokenizer and adapter, refused before the weights load where they cannot work."""

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pte_trl.adapter.config import one_of
from pte_trl.adapter.model import check_supported, pte_layers, rescale_updates, update_ratios
from pte_trl.config import PteGRPOConfig, RecipeArguments
from pte_trl.engine import left_pad
from pte_trl.engines import check_engine, launched_engine
from pte_trl.evaluation.config import ModelSource
from pte_trl.replay import MASKED_ATTENTION
from pte_trl.schedule import Schedule, resolve_window


def check_model(script: RecipeArguments, args: PteGRPOConfig) -> None:
    """Reads only the model's configuration, and what the launcher asks for.

    Raises:
        ValueError: an unsupported architecture, attention implementation or engine for a bounded method.
    """
    check_engine(args, *launched_engine(args))
    one_of("dtype", script.dtype, ("bfloat16", "float32", "auto"))
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    if args.method != "lora":
        one_of("attn_implementation", script.attn_implementation, MASKED_ATTENTION)
        check_supported(config)


def check_evaluation_model(args: ModelSource) -> None:
    """Reads only configurations: the model's and the adapter's.

    Raises:
        ValueError: an unsupported architecture, or a folder without an adapter.
    """
    check_supported(AutoConfig.from_pretrained(args.model_name_or_path))
    if args.adapter is not None:
        PeftConfig.from_pretrained(args.adapter)


def load_tokenizer(script: RecipeArguments | ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(script: RecipeArguments) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter that training starts from if the recipe names one."""
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path, dtype=dtype, attn_implementation=script.attn_implementation
    )
    if script.adapter is not None:
        model = PeftModel.from_pretrained(model, script.adapter, is_trainable=True)
    return model


def load_for_evaluation(args: ModelSource, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model with its adapter, for sampling only."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, dtype=dtype, attn_implementation=args.attn_implementation
    )
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
    return model.to(device).eval()


def calibrate_encoders(trainer, prompts: int = 8) -> None:
    """Sets |S'| / |S| of a fresh PTE adapter to `init_ratio` on the first prompts of the training set, aloud.

    The main process measures, every process rescales: the others may hold no weights yet.
    """
    if not pte_layers(trainer.model):
        return
    rows = [trainer.train_dataset[i]["prompt"] for i in range(min(prompts, len(trainer.train_dataset)))]
    found = [None]
    with trainer._dist.gather_params(list(trainer.model.parameters())):
        if trainer.accelerator.is_main_process:
            ids, _, _ = trainer._tokenize_prompts(rows)
            inputs = left_pad(ids, trainer._tokenizer.pad_token_id, trainer.model.device)
            window = resolve_window(trainer.args.window, trainer.args.budget, max(map(len, ids)))
            found = [update_ratios(trainer.model, *inputs, evict=Schedule(window, trainer.args.evict_ratio).evict)]
    (ratios,) = broadcast_object_list(found)
    rescale_updates(trainer.model, ratios)
    trainer.accelerator.print(
        f"encoders calibrated on {len(rows)} prompts: |S'|/|S| was {min(ratios):.3g} to {max(ratios):.3g} over "
        f"{len(ratios)} layers"
    )
