"""The training steps that step.py, memory.py and baselines.py measure. Nothing runs here.

Every arm has gradient checkpointing and TRL's fused LM head, and adapts the same two modules at the same rank. All
arms share one set of base weights.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import random_model, shared_copy, with_adapter
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.trl import add_fused_lm_head
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps

# arm: (adapter, how a completion goes through it)
ARMS = {
    "lora, full cache": ("lora", "ordinary"),
    "lora_c, one pass": ("lora", "one pass"),
    "pte, one pass": ("pte", "one pass"),
    "pte, segments": ("pte", "segments"),
}


def add_options(parser: argparse.ArgumentParser, lengths: list[int]) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="of the completion")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1, help="completions of the micro-batch")
    parser.add_argument("--segment-length", type=int, help="thought tokens of a segment at most; else 512 or W")
    parser.add_argument("--offload", action="store_true", help="segments: past keys and values on the CPU")


def trainable(base: nn.Module, adapter: str) -> nn.Module:
    """The base's weights with an adapter, as a trainer would prepare it."""
    model = shared_copy(base)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return with_adapter(model, adapter).train()


def arms(args: argparse.Namespace, names: list[str] | None = None) -> dict[str, tuple[nn.Module, Callable]]:
    """Name -> (model, its step: token ids (batch, prompt + completion) -> sum of their log-probs), graph attached."""
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))
    models = {adapter: trainable(base, adapter) for adapter in ("lora", "pte")}
    return {
        name: (models[ARMS[name][0]], step_of(models[ARMS[name][0]], ARMS[name][1], args)) for name in names or ARMS
    }


def step_of(model: nn.Module, way: str, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    def at_once(ids: Tensor) -> Tensor:
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, : args.prompt] = -100
        # The plan and the mask belong to the price of a replay, so they are built inside.
        extra = {"attention_mask": mask}
        if way == "one pass":
            extra = replay_inputs(model, mask, args.prompt, Schedule(args.window))
        return model(input_ids=ids, labels=labels, fused_lm_head=True, **{"use_cache": False, **extra}).log_probs.sum()

    def segments(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        how = {"segment_length": args.segment_length, "offload": args.offload}
        return segment_logps(model, ids, mask, args.prompt, Schedule(args.window), **how)[0].sum()

    def step(ids: Tensor) -> Tensor:
        # As the trainer does: a float32 adapter beside bfloat16 weights, under autocast.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return segments(ids) if way == "segments" else at_once(ids)

    return step


def tokens(args: argparse.Namespace, length: int) -> Tensor:
    """(batch, prompt + length) random ids."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 500, (args.batch, args.prompt + length), generator=generator).to(args.device)
