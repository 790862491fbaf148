"""Settings of TRL and transformers that a bounded method cannot honour, each with the reason.

They are refused, since TRL would take them and train on something else than was sampled, or do nothing. `lora` is
TRL untouched and takes them all. tests/test_settings.py has a line for every field that there is.
"""

from dataclasses import fields
from typing import Any, NamedTuple

from pte_trl.rollouts.vllm import WHY


class Only(NamedTuple):
    """The value a bounded method allows, and why no other."""

    allowed: Any
    why: str


SCORES = "the replay scores the whole vocabulary and would not give the log-probs that were sampled"
DECODES = "the rollout has its own bounded cache and sampling"
NO_VLLM = f"vLLM takes no part: {WHY}"
REFERENCE = "the reference of the KL term is the base model (eq. 3), which does not change"
UNUSED = "TRL's trainers have no use for it, so it would have no effect"
TEACHER = Only(None, "the teacher is the base model itself, with its adapter off")
TOOLS = Only(None, "rollouts of several turns under a bounded cache are not supported yet")

SETTINGS: dict[str, Only] = {
    "top_p": Only(1.0, SCORES),
    "top_k": Only(0, SCORES),
    "min_p": Only(None, SCORES),
    "repetition_penalty": Only(1.0, SCORES),
    "generation_kwargs": Only(None, SCORES),
    "cache_implementation": Only(None, DECODES),
    "use_vllm": Only(False, f"{DECODES}; {WHY}"),
    "use_transformers_continuous_batching": Only(False, DECODES),
    "transformers_continuous_batching_config": Only(None, DECODES),
    "use_transformers_paged": Only(False, DECODES),
    "use_liger_kernel": Only(False, "its loss computes log-probs under the full cache"),
    "liger_kernel_config": Only(None, "its loss computes log-probs under the full cache"),
    "neftune_noise_alpha": Only(None, "noise on the embeddings in training is not in the rollout"),
    "label_smoothing_factor": Only(0.0, "the loss has no labels, so it would have no effect"),
    "torch_compile": Only(False, "the replay's shapes change with every batch, and nobody has tried it"),
    "torch_compile_backend": Only(None, "only with torch_compile"),
    "torch_compile_mode": Only(None, "only with torch_compile"),
    "parallelism_config": Only(None, "a layer's keys, values and state must be on one device"),
    "sync_ref_model": Only(False, REFERENCE),
    "ref_model_mixup_alpha": Only(0.6, REFERENCE),
    "ref_model_sync_steps": Only(512, REFERENCE),
    "train_sampling_strategy": Only("random", UNUSED),
    "length_column_name": Only("length", UNUSED),
    "label_names": Only(None, UNUSED),
    "include_for_metrics": Only([], "TRL's trainers compute no metrics from predictions"),
    "batch_eval_metrics": Only(False, "TRL's trainers compute no metrics from predictions"),
    "optim_target_modules": Only(None, "GaLore's optimizers take whole weight matrices, an adapter has none"),
    "max_tool_calling_iterations": TOOLS,
    "teacher_model_name_or_path": TEACHER,
    "teacher_model_revision": TEACHER,
    "teacher_model_init_kwargs": TEACHER,
}

# Arguments of the trainers.
ARGUMENTS: dict[str, Only] = {
    "tools": TOOLS,
    "rollout_func": TOOLS,
    "environment_factory": TOOLS,
    "quantization_config": Only(None, "the encoder reads the layers' own weights, which must not be quantised"),
    "teacher_model": TEACHER,
}


def check_settings(args) -> None:
    """Refuses the first setting of a trainer's config that its bounded method cannot honour.

    Raises:
        ValueError: naming the key, its value, what is allowed and why.
    """
    for field in fields(args):
        # Of vLLM's many settings each must have its default.
        only = Only(field.default, NO_VLLM) if field.name.startswith("vllm_") else SETTINGS.get(field.name)
        if only is not None:
            refuse_other(field.name, getattr(args, field.name), only, args.method)


def check_arguments(arguments: dict[str, Any], config: type) -> None:
    """Refuses arguments of a trainer of this project before TRL loads and wraps the model.

    Args:
        arguments: of the trainer, by their names.
        config: the class that its `args` must have.

    Raises:
        ValueError: another config, or what a bounded method cannot honour.
    """
    settings = arguments.get("args")
    if not isinstance(settings, config):
        raise ValueError(f"args={type(settings).__name__}: must be a {config.__name__}, which has method and window")
    if settings.method != "lora":
        for key, only in ARGUMENTS.items():
            if key in arguments:
                refuse_other(key, arguments[key], only, settings.method)


def refuse_other(key: str, value, only: Only, method: str) -> None:
    # An empty mapping, list or text counts as not given, like None.
    if value == only.allowed or (only.allowed is None and isinstance(value, (dict, list, str)) and not value):
        return
    shown = getattr(value, "__name__", None) or " ".join(repr(value).split())
    raise ValueError(f"{key}={shown}: method={method} allows only {only.allowed!r}, since {only.why}")
