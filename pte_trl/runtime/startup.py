"""One table of what is really running, and a stop before the first step where it is not what was launched.

Engine, sharding and dtypes are read off the objects that train (the wrapped model, its optimizer, its parameters),
never off a config: a config is what they are compared with.
"""

import os
from collections import Counter

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from pte_trl.adapter.model import pte_layers
from pte_trl.cache.masks import BLOCKWISE
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.engines import running_zero_stage, zero3_numel
from pte_trl.compat.transformers import attention_of
from pte_trl.estimate.shape import NotEstimated
from pte_trl.estimate.terms import Job, estimate
from pte_trl.replay.segment_run import keys_follow_state
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.launch import named_launch

SHARDINGS = {"ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP1": "fsdp2", "FSDP2": "fsdp2"}


def running_engine(model: nn.Module) -> str:
    """The engine that a prepared model is in, by the classes of the model, its optimizer and its parameters."""
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    if isinstance(model, nn.DataParallel):
        return "DataParallel"
    if (stage := running_zero_stage(model)) is not None:
        return f"ZeRO-{stage}"
    return "FSDP2" if any(isinstance(p, DTensor) for p in model.parameters()) else "single"


def local_and_whole(parameter: nn.Parameter) -> tuple[int, int]:
    """Elements of a parameter on this GPU, and in all."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel(), parameter.numel()
    return zero3_numel(parameter) or (parameter.numel(), parameter.numel())


def dtypes(parameters: list[nn.Parameter]) -> str:
    counts = Counter()
    for parameter in parameters:
        counts[str(parameter.dtype).removeprefix("torch.")] += local_and_whole(parameter)[1]
    return " and ".join(f"{size / 1e6:.4g} M {name}" for name, size in counts.most_common()) or "none"


def job_of(trainer, engine: str | None, max_prompt_tokens: int) -> Job:
    """The memory estimate's input for a trainer."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    sizes = [(p.requires_grad, local_and_whole(p)[1]) for p in model.parameters()]
    trainable = sum(size for wanted, size in sizes if wanted)
    per_rollout = args.per_device_train_batch_size * args.steps_per_generation
    in_parts = args.method != "lora" and isinstance(args.rollout_batch_size, int)
    at_once = args.rollout_batch_size if in_parts else per_rollout
    return Job(
        config=model.config,
        parameters=sum(size for _, size in sizes) - trainable,
        trainable=trainable,
        method=args.method,
        prompt=max_prompt_tokens,
        completion=args.max_completion_length,
        schedule=longest_schedule(args.cache_policy, max_prompt_tokens),
        micro_batch=args.per_device_train_batch_size,
        rollout_batch=0 if args.use_vllm else min(at_once, per_rollout),  # vLLM has memory of its own
        num_generations=args.num_generations,
        dtype=next((p.dtype for p in model.parameters() if not p.requires_grad), torch.float32),
        ranks=trainer.accelerator.num_processes,
        sharding=SHARDINGS.get(engine, "none"),
        checkpointing=args.gradient_checkpointing,
        replay=trainer.replay.kind,
        segment_length=args.segment_length,
        offload=trainer.replay.offload,
        evicts_own=not keys_follow_state(model),
        reference=args.beta != 0,
        engine_stays=in_parts,
        state_rank=next((c.rank for c in getattr(model, "peft_config", {}).values() if hasattr(c, "rank")), 32),
        state_heads=max((e.heads for layer in pte_layers(model) for e in layer.pte_encoder.values()), default=1),
        blockwise=attention_of(model.config) in BLOCKWISE,
        device=trainer.accelerator.device.type,
    )


def longest_prompt_that_fits(policy: CachePolicy, max_prompt_tokens: int) -> int:
    """A prompt that fills the whole budget, which `max_prompt_tokens` may allow, leaves no room for a thought."""
    return max_prompt_tokens if policy.budget is None else min(max_prompt_tokens, policy.budget - 1)


def longest_schedule(policy: CachePolicy, max_prompt_tokens: int) -> Schedule | None:
    """The evictions at the longest prompt there can be, of ranges with the largest W; None for the full cache."""
    return policy.at(1, 0).schedule(longest_prompt_that_fits(policy, max_prompt_tokens))


def cache_lines(policy: CachePolicy, length: int, max_prompt_tokens: int) -> tuple[str, str]:
    """What is kept, and how often a completion of `length` tokens is evicted from, in words."""
    schedule = longest_schedule(policy, max_prompt_tokens)
    if schedule is None:
        return "full", "none"
    if policy.drawn:
        return drawn_lines(policy, length, max_prompt_tokens)
    window, evictions = schedule.window, schedule.evictions(length - 1)
    if policy.budget is not None:
        prompt = longest_prompt_that_fits(policy, max_prompt_tokens)
        kept = f"budget {policy.budget}, W = {window} at prompts of {prompt} tokens, wider at shorter ones"
        return kept, f"{evictions} at {length} tokens and the longest prompt, fewer at shorter ones"
    if policy.window == "auto":
        kept = f"window auto, W = a sample's own prompt, at most {window}"
        return kept, f"{evictions} at {length} tokens and W = {window}, more where W is smaller"
    return f"window {window}", f"{evictions} at {length} tokens"


def drawn_lines(policy: CachePolicy, length: int, max_prompt_tokens: int) -> tuple[str, str]:
    """`cache_lines` of a policy whose W or evict_ratio is a range."""
    ends = [policy.at(0, 0), policy.at(1, 1)]
    low, high = (cache_lines(end, length, max_prompt_tokens)[0] for end in ends)
    words = low if low == high else f"window drawn from {ends[0].window} to {ends[1].window} (log-uniform)"
    if isinstance(policy.evict_ratio, tuple):
        words += ", evict_ratio drawn from {:g} to {:g}".format(*policy.evict_ratio)
    most, fewest = (longest_schedule(end, max_prompt_tokens).evictions(length - 1) for end in ends)
    return words, f"{fewest} to {most} at {length} tokens"


def rollout_line(args) -> str:
    if args.method != "lora":
        return f"bounded decode, completions at once: {args.rollout_batch_size or 'all'}"
    if args.use_vllm:
        share = f", {args.vllm_gpu_memory_utilization:g} of the GPU on top of the memory below"
        return f"vLLM, {args.vllm_mode}{share if args.vllm_mode == 'colocate' else ''}"
    continuous = args.use_transformers_continuous_batching
    return "transformers, continuous batching" if continuous else "transformers generate"


def sharding_line(engine: str, parameters: list[nn.Parameter], ranks: int) -> str:
    """What an engine divides, and the share of all parameters that this GPU holds, counted."""
    divided = {"ZeRO-1": "optimizer", "ZeRO-2": "optimizer and gradients"}
    divided |= dict.fromkeys(("ZeRO-3", "FSDP1", "FSDP2"), "optimizer, gradients and weights")
    held, whole = (sum(sizes) for sizes in zip(*map(local_and_whole, parameters), strict=True))
    return f"{divided.get(engine, 'nothing')} divided by {ranks}; {100 * held / whole:.0f} % of the parameters here"


def memory_line(trainer, engine: str, max_prompt_tokens: int | None) -> str:
    """The estimate, of GRPO, or why there is none."""
    if max_prompt_tokens is None:
        return "not estimated, the longest prompt is not known"
    if not hasattr(trainer.args, "num_generations"):
        return "not estimated for a distillation"
    try:
        terms = estimate(job_of(trainer, engine, max_prompt_tokens))
    except NotEstimated as error:
        return str(error)
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in terms.items() if name != "peak" and size)
    return f"{terms['peak'] / 1e9:.3g} GB per process, estimated; in GB: {parts}"


def describe(trainer, engine: str, max_prompt_tokens: int | None) -> dict[str, str]:
    """The rows of the table."""
    args, accelerator = trainer.args, trainer.accelerator
    parameters = list(trainer.model.parameters())
    micro, steps, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    batch, asked = micro * steps * ranks, "" if args.global_batch is None else f", global_batch={args.global_batch}"
    if max_prompt_tokens is None and args.cache_policy.bounded:
        kept, evictions = f"window {args.window}, budget {args.budget}", "not known, as the longest prompt"
    else:
        kept, evictions = cache_lines(args.cache_policy, args.max_completion_length, max_prompt_tokens or 0)
    per_prompt = getattr(args, "num_generations", 1)
    frozen = [p for p in parameters if not p.requires_grad]
    return {
        "method": args.method,
        "engine": f"{engine} on {accelerator.device.type}",
        "ranks": f"{ranks} on {os.environ.get('GROUP_WORLD_SIZE', 1)} node(s)",
        "precision": f"mixed precision {accelerator.mixed_precision}; frozen {dtypes(frozen)}",
        "adapter": dtypes([p for p in parameters if p.requires_grad]),
        "sharding": sharding_line(engine, parameters, ranks),
        "global batch": f"{micro} x {steps} accumulated x {ranks} ranks = {batch} completions{asked}",
        "prompts a step": f"{batch / per_prompt:g}, {per_prompt} completions each",
        "cache": kept,
        "evictions": evictions,
        "replay": "none, TRL scores" if args.method == "lora" else str(getattr(trainer, "replay", "one_pass")),
        "rollout": rollout_line(args),
        "peak memory": memory_line(trainer, engine, max_prompt_tokens),
        "tracker": ", ".join(args.report_to) or "none",
    }


class StartupGuard(TrainerCallback):
    """Prints the table when training begins, on the main process, and refuses an engine that was not launched.

    Args:
        trainer: whose model is looked at once it is wrapped.
        max_prompt_tokens: longest prompt there can be, None if it is not known.
    """

    def __init__(self, trainer, max_prompt_tokens: int | None):
        self.trainer, self.max_prompt_tokens = trainer, max_prompt_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        engine, launch = running_engine(self.trainer.model_wrapped), named_launch(args)
        rows = describe(self.trainer, engine, self.max_prompt_tokens)
        if state.is_world_process_zero:
            width = max(map(len, rows))
            # The bar of the trainer has begun a line.
            print("\n" + "\n".join(f"{name:{width}}  {value}" for name, value in rows.items()), flush=True)
        if launch.engine not in (None, engine):
            raise Fault(
                f"{launch.source} names {launch.engine}, but {engine} runs (the model is in "
                f"{type(self.trainer.model_wrapped).__name__}): stopped before the first step"
            )
