"""A recipe's model, tokenizer and adapter, refused before the weights load where they cannot work."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pte_trl.adapter.calibration import fit, measure
from pte_trl.adapter.config import one_of
from pte_trl.adapter.model import check_supported, pte_layers
from pte_trl.config import PteGRPOConfig, RecipeArguments
from pte_trl.engine import left_pad
from pte_trl.evaluation.config import ModelSource
from pte_trl.launch import named_launch
from pte_trl.replay import MASKED_ATTENTION
from pte_trl.rollout import rollout
from pte_trl.schedule import Schedule, resolve_window
from pte_trl.sharding import check_engine
from pte_trl.trained import check_adapter_file, check_adapter_whole


def check_model(script: RecipeArguments, args: PteGRPOConfig) -> None:
    """Reads only the model's configuration, and what the launcher asks for.

    Raises:
        ValueError: an unsupported architecture, attention implementation or engine for a bounded method; an adapter
            that is not in safetensors; a model with code of its own, unless the recipe trusts it.
    """
    check_engine(args, named_launch(args).engine)
    one_of("dtype", script.dtype, ("bfloat16", "float32", "auto"))
    config = AutoConfig.from_pretrained(script.model_name_or_path, trust_remote_code=args.trust_remote_code)
    if script.adapter is not None:
        script.adapter = str(adapter_folder(script.adapter))
    if args.method != "lora":
        one_of("attn_implementation", script.attn_implementation, MASKED_ATTENTION)
        check_supported(config)


def check_evaluation_model(args: ModelSource) -> None:
    """Reads only configurations: the model's and the adapter's.

    Raises:
        ValueError: an unsupported architecture, or a folder without an adapter in safetensors.
    """
    check_supported(AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code))
    if args.adapter is not None:
        args.adapter = str(adapter_folder(args.adapter))
        PeftConfig.from_pretrained(args.adapter)


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
    check_adapter_file(folder)
    return folder


def load_tokenizer(script: RecipeArguments | ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(
        script.model_name_or_path, padding_side="left", trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(script: RecipeArguments, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter that training starts from if the recipe names one."""
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path,
        dtype=dtype,
        attn_implementation=script.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if script.adapter is not None:
        model = PeftModel.from_pretrained(model, script.adapter, is_trainable=True)
        check_adapter_whole(model, script.adapter)
    return model


def load_for_evaluation(args: ModelSource, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model with its adapter, for sampling only."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
        check_adapter_whole(model, args.adapter)
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
