"""Which recipes fit a machine: the estimated peak of each against the memory there is. No weights, no hub."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from pte_trl.adapter.fit import check_supported, key_heads
from pte_trl.estimate.choice import CONTEXT, FRAGMENTS, affordable, with_replay
from pte_trl.estimate.terms import SHAPES, Job, count, estimate
from pte_trl.models.attention import usable_attention
from pte_trl.runtime.startup import longest_schedule
from pte_trl.settings.parsing import parse, read_recipe
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillConfig
from pte_trl.training.global_batch import accumulation_steps
from pte_trl_cli.machine import GB, Gpu

# Models whose shape the package has, by the names that recipes give them.
KNOWN = {
    "Qwen/Qwen2.5-3B-Instruct": "qwen2.5-3b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama-8b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "allenai/OLMoE-1B-7B-0125-Instruct": "olmoe-1b-7b",
    "LiquidAI/LFM2-1.2B": "lfm2-1.2b",
    "outputs/smollm2-135m": "smollm2-135m",
    "outputs/tiny-base": "tiny",
}

# So that a recipe parses on any machine; none of these changes the estimate.
ANYWHERE = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--report_to", "none"]

# What makes a run smaller and leaves its result as it is, the cheapest in time first.
SMALLER = (
    ("rollout_batch_size: 16", {"rollout_batch": 16}),
    ("per_device_train_batch_size: 2 with more accumulation", {"micro_batch": 2}),
    ("both: rollout_batch_size: 16, per_device_train_batch_size: 2", {"rollout_batch": 16, "micro_batch": 2}),
    (
        "rollout_batch_size: 16, per_device_train_batch_size: 2, replay: segments, offload_cache: true",
        {"rollout_batch": 16, "micro_batch": 2, "replay": "segments", "offload": True},
    ),
)


@dataclass(frozen=True)
class Fit:
    """A recipe on this machine: its peak in bytes (None: not estimated), and the verdict in words."""

    recipe: str
    peak: float | None
    verdict: str


def config_of(name: str) -> PretrainedConfig:
    """A model's configuration from its folder, the package's shapes or the hub's local cache.

    Raises:
        ValueError: it is in none of them.
    """
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name)
    if name in KNOWN:
        return AutoConfig.from_pretrained(SHAPES / KNOWN[name])
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") <= 1 else None
    if isinstance(cached, str):
        return AutoConfig.from_pretrained(Path(cached).parent)
    raise ValueError(f"not estimated: model_name_or_path={name!r} is no folder here and not in the hub's cache")


def is_distillation(path: str) -> bool:
    """Whether a recipe is for `pte-trl distill`, by its name or by keys that GRPO does not have."""
    only = {field.name for field in fields(PteDistillConfig)} - {field.name for field in fields(PteGRPOConfig)}
    return "distill" in Path(path).stem or bool(only & set(read_recipe("config", path)))


def job_of(path: str, device: str, ranks: int = 1, flags: tuple[str, ...] = ()) -> Job:
    """The memory estimate's input for a GRPO recipe; `replay: auto` counts as one pass.

    Args:
        device: "cuda" or "cpu".
        ranks: GPUs, each with all the weights (DDP).
        flags: of the command line, on top of the recipe.

    Raises:
        ValueError: what the recipe's parser refuses, or a model that is not supported or whose shape is not known.
    """
    script, args = parse((RecipeArguments, PteGRPOConfig), ["--config", path, *flags, *ANYWHERE])
    config = config_of(script.model_name_or_path)
    dtype = getattr(torch, "bfloat16" if script.dtype == "auto" else script.dtype)
    per_rollout = args.per_device_train_batch_size * args.steps_per_generation
    if args.global_batch is not None and not args.given & {"steps_per_generation", "generation_batch_size"}:
        # The recipe was read for one process; on several, each has its share of the global batch in a rollout.
        micro_batches = accumulation_steps(args.global_batch, args.per_device_train_batch_size, ranks)
        per_rollout = args.per_device_train_batch_size * micro_batches
    in_parts = args.method != "lora" and isinstance(args.rollout_batch_size, int)
    at_once = args.rollout_batch_size if in_parts else per_rollout
    adapter = script.adapter_config(args.method)
    if args.method != "lora":
        attention = usable_attention(script.attn_implementation, config, quiet=True)
        check_supported(config, args.method, adapter if args.method == "pte" else None, attention)
    return Job(
        config=config,
        parameters=count(config),
        trainable=count(config, adapter),
        method=args.method,
        prompt=script.max_prompt_tokens,
        completion=args.max_completion_length,
        schedule=longest_schedule(args.cache_policy, script.max_prompt_tokens),
        micro_batch=args.per_device_train_batch_size,
        rollout_batch=0 if args.use_vllm else min(at_once, per_rollout),
        num_generations=args.num_generations,
        dtype=dtype,
        ranks=ranks,
        checkpointing=args.gradient_checkpointing,
        replay="one_pass" if args.replay == "auto" else args.replay,
        segment_length=args.segment_length,
        offload=args.offload_cache,
        evicts_own=args.method != "pte" or not {"k_proj", "v_proj"} & set(adapter.target_modules),
        reference=args.beta != 0,
        engine_stays=in_parts,
        state_rank=script.rank,
        state_heads=key_heads(config) if script.state_per_head else 1,
        blockwise=usable_attention(script.attn_implementation, config, quiet=True).startswith("blockwise"),
        device=device,
    )


def fit(path: str, found: list[Gpu], free: float) -> Fit:
    """A recipe against this machine.

    Args:
        found: the GPUs.
        free: bytes of memory for a recipe that trains on the CPU.
    """
    try:
        if is_distillation(path):
            return Fit(path, None, "not estimated: a distillation")
        recipe = read_recipe("config", path)
        on_cpu = bool(recipe.get("use_cpu", False))
        ranks = 1 if on_cpu else max(1, len(found))
        job = job_of(path, "cpu" if on_cpu else "cuda", ranks)
    except (ValueError, OSError) as error:
        return Fit(path, None, " ".join(str(error).split()))
    if not on_cpu and not found:
        return Fit(path, estimate(job)["peak"], "needs a GPU of that size; there is none here")
    room = free if on_cpu else (1 - FRAGMENTS) * min(gpu.free for gpu in found) - CONTEXT
    if not on_cpu and job.method != "lora" and recipe.get("replay", "auto") == "auto":
        job = with_replay(job, affordable(job, room))  # as the run will choose
    peak = estimate(job)["peak"]
    return Fit(path, peak, verdict(job, peak, room, "the free memory" if on_cpu else "each GPU"))


def verdict(job: Job, peak: float, room: float, where: str) -> str:
    if peak <= room:
        return f"fits {where}, {room / GB:.1f} GB{', in segments' if job.replay == 'segments' else ''}"
    options = [(words, replace(job, **_smaller(job, changes))) for words, changes in SMALLER]
    if job.ranks > 1:
        options.append(("accelerate_configs/zero3.yaml", replace(job, sharding="zero3")))
    for words, smaller in options:
        need = estimate(smaller)["peak"]
        if need <= room:
            return f"does not fit {where}, {room / GB:.1f} GB; takes {need / GB:.1f} GB with {words}"
    return f"does not fit {where}, {room / GB:.1f} GB"


def _smaller(job: Job, changes: dict) -> dict:
    """The changes that apply: sizes never grow, and segments are for bounded methods."""
    return {
        key: min(value, getattr(job, key)) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in changes.items()
        if job.method != "lora" or key not in ("replay", "offload")
    }
