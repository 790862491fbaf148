"""A model and an adapter, of a recipe or given to a trainer by name: refused before the weights load where they cannot
work, and loaded."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler

from pte_trl.adapter.check import check_adapter, check_adapter_folder, load_adapter
from pte_trl.adapter.config import one_of
from pte_trl.adapter.files import adapter_folder
from pte_trl.adapter.fit import check_supported
from pte_trl.cache.masks import MASKED_ATTENTION
from pte_trl.data.needs import model_needs
from pte_trl.models.attention import usable_attention
from pte_trl.models.hub import reachable
from pte_trl.models.loading import check_base, load_base, load_weights
from pte_trl.models.tokens import load_tokenizer
from pte_trl.replay.attention import NAME
from pte_trl.runtime.launch import named_launch
from pte_trl.runtime.sharding import check_engine
from pte_trl.training.arguments import ADAPTER_KEYS, RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.given import check_targets, loaded_here
from pte_trl.training.router import check_whole

# Patterns of a hub repository's files besides weights: tokenizers, chat templates, configurations and code.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")


def check_model(script: RecipeArguments, args: PteGRPOConfig) -> None:
    """Checks the files of the model and of the adapter, and the engine that was launched; loads no weights.

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
    made = script.adapter_config(args.method) if script.adapter is None else None
    if args.method != "lora":
        one_of("attn_implementation", script.attn_implementation, MASKED_ATTENTION)
        script.attn_implementation = usable_attention(script.attn_implementation, config)
        check_supported(config, args.method, made if args.method == "pte" else None, script.attn_implementation)
        if getattr(args, "replay", None) == "segments":
            check_whole(args, config)
    elif script.attn_implementation == NAME:
        # `lora` trains any architecture, those that no bounded method can by transformers' own choice.
        known = loaded_here(args.method, config)
        script.attn_implementation = usable_attention(NAME, config) if known else None
    if made is not None:
        check_adapter(args.method, made, model_config=config)
        check_targets(args.method, made, config, args.trust_remote_code)
        return
    name = script.adapter
    script.adapter = str(adapter_folder(name))
    adapter = check_adapter_folder(script.adapter, config, args.trust_remote_code)
    stated = {key: getattr(script, key) for key in ADAPTER_KEYS if key in getattr(script, "given", ())}
    check_adapter(args.method, adapter, settings=stated, model_config=config, source=f"adapter={name!r}")


def check_without_effect(args: PteGRPOConfig) -> None:
    """Refuses settings that the scripts do not pass on; a trainer would fail late, or ignore them.

    Raises:
        ValueError: naming what does that.
    """
    no_set = "a recipe has no set to evaluate on while it trains; recipes/evaluate.py evaluates what is saved"
    for key, allowed, why in (
        ("eval_strategy", "no", no_set),
        ("eval_on_start", False, no_set),
        ("load_best_model_at_end", False, no_set),
        ("model_init_kwargs", None, "the keys dtype, attn_implementation and trust_remote_code say how it is loaded"),
    ):
        value = getattr(getattr(args, key), "value", getattr(args, key))
        if value != allowed:
            raise ValueError(f"{key}={value!r}: {why}; allowed is {allowed!r}")


def check_optimizer(args: PteGRPOConfig) -> None:
    """Makes the optimizer and the schedule for one weight: packages or arguments may be missing.

    Raises:
        ValueError: naming the setting, with what transformers or torch says.
    """
    weights = [torch.zeros(1, requires_grad=True)]
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if args.optim_args and options == without_optim_args(args):
            raise ValueError("this optimizer makes no use of them; leave optim_args out")
        if optimizer.__module__.startswith("torch.optim"):  # others may want a GPU, or more than one weight
            optimizer(weights, **options)
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        given = f" with optim_args={args.optim_args!r}" if args.optim_args else ""
        raise ValueError(f"optim={args.optim.value!r}{given}: {error}") from error
    name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    try:
        weight = torch.optim.SGD(weights)
        get_scheduler(name, weight, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={getattr(name, 'value', name)!r} with lr_scheduler_kwargs={options!r}: {error}"
        ) from error


def without_optim_args(args: PteGRPOConfig) -> dict:
    """What the optimizer is made with where no `optim_args` are given."""
    plain = copy.copy(args)
    plain.optim_args = None
    return Trainer.get_optimizer_cls_and_kwargs(plain)[1]


def load_model(script: RecipeArguments, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter that training starts from if the recipe names one."""
    model = load_base(script, trust_remote_code)
    return model if script.adapter is None else load_adapter(model, script.adapter, is_trainable=True)


def load_named(name: str, settings, config) -> PreTrainedModel:
    """The model that a trainer is given by name, as TRL loads it (`model_init_kwargs`; float32 by default) and
    as a recipe does: all of its weights are there, attention is `blockwise` by default (`eager` where that alone is
    right), and its own sampling settings are left out.

    Raises:
        ValueError: weights are missing, or of other shapes than the configuration says.
    """
    options = {"dtype": "float32", "trust_remote_code": settings.trust_remote_code} | (
        settings.model_init_kwargs or {}
    )
    if "attn_implementation" not in options:
        options["attn_implementation"] = usable_attention(NAME, config)
    if settings.world_size > 1:
        options["device_map"] = None  # every process has a model of its own
    return load_weights(name, key="model", **options)


def load_named_tokenizer(name: str, settings) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that a trainer is given by name.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    options = settings.model_init_kwargs or {}
    trust = options.get("trust_remote_code", settings.trust_remote_code)
    folder = _tokenizer_at_revision(name, options)
    source = SimpleNamespace(model_name_or_path=folder, chat_template_kwargs=settings.chat_template_kwargs)
    return load_tokenizer(source, trust, key="model")


def _tokenizer_at_revision(name: str, options: dict) -> str:
    """`name`; with a `revision` of a model on the hub, the cached folder of that revision's tokenizer and config.

    A folder here has no revisions: transformers ignores the option as well.
    """
    if options.get("revision") is None or Path(name).expanduser().is_dir():
        return name
    return snapshot_download(
        name, revision=options["revision"], token=options.get("token"), allow_patterns=TOKENIZER_FILES
    )
