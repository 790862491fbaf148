"""A recipe's model, tokenizer and adapter, refused before the weights load where they cannot work."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, get_scheduler

from pte_trl.adapter.check import check_adapter, check_adapter_folder, expected_shapes, load_adapter
from pte_trl.adapter.config import one_of
from pte_trl.adapter.files import adapter_folder
from pte_trl.adapter.fit import FAMILIES, check_supported
from pte_trl.cache.masks import MASKED_ATTENTION
from pte_trl.data.needs import model_needs
from pte_trl.models.hub import reachable
from pte_trl.models.loading import check_base, load_base
from pte_trl.replay.attention import NAME
from pte_trl.runtime.launch import named_launch
from pte_trl.runtime.sharding import check_engine
from pte_trl.training.arguments import ADAPTER_KEYS, RecipeArguments
from pte_trl.training.config import PteGRPOConfig


def check_model(script: RecipeArguments, args: PteGRPOConfig) -> None:
    """Looks at the files of the model and of the adapter, and at what the launcher asks for; loads no weights.

    Raises:
        ValueError: an unsupported architecture, attention implementation or engine for a bounded method; a model
            folder or an adapter that is not whole; an adapter of another method, model or setting; a model with code
            of its own, unless the recipe trusts it.
    """
    check_without_effect(args)
    check_optimizer(args)
    reachable(*model_needs(script))
    check_engine(args, named_launch(args).engine)
    check_fits(script, args, check_base(script.model_name_or_path, args.trust_remote_code))


def check_fits(script: RecipeArguments, args: PteGRPOConfig, config) -> None:
    """Compares the recipe and its adapter with the configuration of the base model.

    Raises:
        ValueError: as `check_model`.
    """
    if args.method == "lora":
        if script.attn_implementation == NAME and config.model_type not in FAMILIES:
            script.attn_implementation = None  # `lora` trains any architecture, by transformers' own choice
    else:
        one_of("attn_implementation", script.attn_implementation, MASKED_ATTENTION)
        check_supported(config)
    if script.adapter is None:
        check_fresh_adapter(script, args, config)
        return
    name = script.adapter
    script.adapter = str(adapter_folder(name))
    adapter = check_adapter_folder(script.adapter, config, args.trust_remote_code)
    stated = {key: getattr(script, key) for key in ADAPTER_KEYS if key in getattr(script, "given", ())}
    check_adapter(args.method, adapter, settings=stated, model_config=config, source=f"adapter={name!r}")


def check_without_effect(args: PteGRPOConfig) -> None:
    """Refuses what the trainers know and the scripts do not hand them; they find it out late, or ignore it.

    Raises:
        ValueError: naming what does that.
    """
    no_set = "a recipe has no set to evaluate on while it trains; recipes/evaluate.py evaluates what is saved"
    for key, allowed, why in (
        ("eval_strategy", "no", no_set),
        ("eval_on_start", False, no_set),
        ("model_init_kwargs", None, "the keys dtype, attn_implementation and trust_remote_code say how it is loaded"),
    ):
        value = getattr(getattr(args, key), "value", getattr(args, key))
        if value != allowed:
            raise ValueError(f"{key}={value!r}: {why}; allowed is {allowed!r}")


def check_optimizer(args: PteGRPOConfig) -> None:
    """Makes the optimizer's class and, for one weight, the schedule: packages or arguments may be missing.

    Raises:
        ValueError: naming the setting, with what transformers says.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optim={args.optim.value!r}: {error}") from error
    name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    try:
        weight = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        get_scheduler(name, weight, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={getattr(name, 'value', name)!r} with lr_scheduler_kwargs={options!r}: {error}"
        ) from error


def check_fresh_adapter(script: RecipeArguments, args: PteGRPOConfig, config) -> None:
    """Builds the adapter on a model without memory, so that a name that is no linear of it is found now."""
    adapter = script.adapter_config(args.method)
    check_adapter(args.method, adapter, model_config=config)
    try:
        expected_shapes(adapter, config, args.trust_remote_code)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"target_modules={script.target_modules!r}: {error}") from error


def load_model(script: RecipeArguments, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter that training starts from if the recipe names one."""
    model = load_base(script, trust_remote_code)
    return model if script.adapter is None else load_adapter(model, script.adapter, is_trainable=True)
