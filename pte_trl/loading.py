"""A recipe's model, tokenizer and adapter, refused before the weights load where they cannot work."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, get_scheduler

from pte_trl.adapter.calibration import fit, measure
from pte_trl.adapter.check import check_adapter, check_adapter_folder, expected_shapes, load_adapter
from pte_trl.adapter.config import one_of
from pte_trl.adapter.fit import FAMILIES, check_supported
from pte_trl.adapter.model import pte_layers
from pte_trl.attention import NAME
from pte_trl.checkpoint_config import neutral_generation_config
from pte_trl.config import ADAPTER_KEYS, PteGRPOConfig, RecipeArguments
from pte_trl.engine import left_pad
from pte_trl.evaluation.config import ModelSource
from pte_trl.hub import reachable
from pte_trl.launch import named_launch
from pte_trl.needs import model_needs
from pte_trl.replay import MASKED_ATTENTION
from pte_trl.rollout import rollout
from pte_trl.schedule import Schedule, resolve_window
from pte_trl.sharding import check_engine
from pte_trl.tokens import load_tokenizer
from pte_trl.weights import check_loaded, check_model_folder

__all__ = ["adapter_folder", "calibrate_encoders", "check_evaluation_model", "check_model", "load_for_evaluation"]
__all__ += ["load_model", "load_tokenizer"]


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


def check_base(name: str, trust_remote_code: bool):
    """The configuration of the base model, whose folder must be whole."""
    check_model_folder(name, trust_remote_code)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def check_fresh_adapter(script: RecipeArguments, args: PteGRPOConfig, config) -> None:
    """Builds the adapter on a model without memory, so that a name that is no linear of it is found now."""
    adapter = script.adapter_config(args.method)
    check_adapter(args.method, adapter, model_config=config)
    try:
        expected_shapes(adapter, config, args.trust_remote_code)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"target_modules={script.target_modules!r}: {error}") from error


def check_evaluation_model(args: ModelSource) -> None:
    """The same for a model to sample from.

    Raises:
        ValueError: an unsupported architecture, a model folder or an adapter that is not whole, or not the model's.
    """
    reachable(*model_needs(args))
    one_of("attn_implementation", args.attn_implementation, MASKED_ATTENTION)
    config = check_base(args.model_name_or_path, args.trust_remote_code)
    check_supported(config)
    if args.adapter is not None:
        args.adapter = str(adapter_folder(args.adapter))
        check_adapter_folder(args.adapter, config, args.trust_remote_code)


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, fetched from the hub if it is none here; its weights are in safetensors.

    Raises:
        ValueError: they are not; a pickled file could run any code, and PEFT would load it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.*"))) or "nothing"
        raise ValueError(f"adapter={name!r}: needs {SAFETENSORS_WEIGHTS_NAME}, the only format loaded; holds {there}")
    return folder


def load_base(source: RecipeArguments | ModelSource, trust_remote_code: bool) -> PreTrainedModel:
    """The base model with all of its weights.

    Raises:
        ValueError: some are missing, or of other shapes than the configuration says.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        source.model_name_or_path,
        dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
        attn_implementation=source.attn_implementation,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    check_loaded(found, source.model_name_or_path)
    # A checkpoint's own sampling settings would change what TRL's `generate` samples, for `lora` alone.
    model.generation_config = neutral_generation_config(model)
    return model


def load_model(script: RecipeArguments, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter that training starts from if the recipe names one."""
    model = load_base(script, trust_remote_code)
    return model if script.adapter is None else load_adapter(model, script.adapter, is_trainable=True)


def load_for_evaluation(args: ModelSource, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model with its adapter, for sampling only."""
    model = load_base(args, args.trust_remote_code)
    if args.adapter is not None:
        model = load_adapter(model, args.adapter)
    return model.to(device).eval()


def calibrate_encoders(trainer, texts: int = 8) -> None:
    """Fits the encoders of a fresh PTE adapter to the base model's keys and values, aloud.

    The first prompts of the training set serve; a whitening has more to find out, and gets twice as many with what the
    base writes to them, since it is thoughts that are evicted. The main process measures, every process fits: the
    others may hold no weights yet.
    """
    layers, args, model = pte_layers(trainer.model), trainer.args, trainer.model
    if not layers:
        return
    whiten = layers[0].config[layers[0]._adapter()].whiten
    texts = min(2 * texts if whiten else texts, len(trainer.train_dataset))
    found = [None]
    with trainer._dist.gather_params(list(model.parameters())):
        if trainer.accelerator.is_main_process:
            ids, _, _ = trainer._tokenize_prompts([trainer.train_dataset[i]["prompt"] for i in range(texts)])
            evict = Schedule(resolve_window(args.window, args.budget, max(map(len, ids))), args.evict_ratio).evict
            if whiten:
                ids = with_thoughts(trainer, ids)
            inputs = left_pad(ids, trainer._tokenizer.pad_token_id, model.device)
            found = [measure(model, *inputs, evict, reach=trainer.max_completion_length if whiten else 0)]
    (found,) = broadcast_object_list(found)
    fit(model, found)
    ratios = [each.ratio for each in found]
    trainer.accelerator.print(
        f"encoders calibrated on {texts} prompts: |S'|/|S| was {min(ratios):.3g} to {max(ratios):.3g} over "
        f"{len(ratios)} layers"
    )
    if whiten:
        widths = [each.dimensions for each in found]
        size = found[0].whiteners[0].shape[-1]
        trainer.accelerator.print(f"keys filled {min(widths):.1f} to {max(widths):.1f} of a head's {size} dimensions")


def with_thoughts(trainer, prompt_ids: list[list[int]], tokens: int = 128) -> list[list[int]]:
    """The prompts, each with the first `tokens` that the model of a fresh adapter, that is, the base, writes to it."""
    tokens = min(tokens, trainer.max_completion_length)
    written = rollout(
        trainer.model,
        prompt_ids,
        window=tokens,
        max_new_tokens=tokens,
        temperature=trainer.temperature,
        eos_token_ids=trainer.eos_token_ids,
        pad_token_id=trainer._tokenizer.pad_token_id,
        seeds=list(range(len(prompt_ids))),
    )
    return [prompt + thought for prompt, thought in zip(prompt_ids, written.completion_ids, strict=True)]
