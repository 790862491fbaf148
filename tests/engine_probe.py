"""Runs recipes/grpo_pte.py under the engine that the launcher makes, and writes down what really ran.

    accelerate launch --config_file CONFIG tests/engine_probe.py REPORTS --config RECIPE --use_cpu true ...

What differs from the recipe's own run, so that one process and two can be compared: every completion has a seed of
its own; the first half of them may be long and the second half ends before its first eviction (two ranks that stop
at different times, one of which encodes nothing); and the reward has spread on an untrained model.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import pte_trl.training.generation
import pte_trl.training.mixin
from pte_trl.adapter.model import pte_layers
from pte_trl.rollouts.rollout import Rollout, rollout
from pte_trl.training import grpo as grpo_pte

SHORT = 6  # tokens, fewer than the window


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7 + len(ids) % 5) for ids in completion_ids]


def allow_fsdp_on_a_cpu() -> None:
    """accelerate makes plain DDP of FSDP on CPUs; told that these are GPUs, it does as it is asked."""
    init = PartialState.__init__

    def as_gpu(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpu


class Probe:
    def __init__(self, reports: Path):
        self.reports, self.report, self.batches = reports, {"completions": []}, count()

    def rollout(self, model, prompt_ids, policy, **options):
        """The trainer's rollout with a seed per completion, in two parts where this process has both halves."""
        state, number, batch = PartialState(), len(prompt_ids), next(self.batches)
        first, half = state.process_index * number, state.num_processes * number // 2
        seeds = [1000 * batch + first + i for i in range(number)]
        cut = min(max(half - first, 0), number)  # how many of the first half are here
        parts = []
        for limit, rows in ((options.pop("max_new_tokens"), slice(0, cut)), (SHORT, slice(cut, number))):
            if prompt_ids[rows]:
                some = options | {"max_new_tokens": limit, "seeds": seeds[rows]}
                some["schedules"] = options["schedules"] and options["schedules"][rows]
                parts.append(rollout(model, prompt_ids[rows], policy, **some))
        result = joined(parts)
        self.report["completions"] += result.completion_ids
        self.report["evictions"] = sum(result.evictions)
        return result

    def calibrate(self, trainer) -> None:
        """Between the trainer's making and its engine's."""
        calibrate(trainer)
        if trainer.accelerator.num_processes == 1:
            trainer.model.save_pretrained(self.reports / "start")
        if trainer.is_deepspeed_enabled:  # or nothing so small as this model would be sharded
            config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        adapter = [p for p in trainer.model.parameters() if p.requires_grad and p.device.type != "meta"]
        bits = b"".join(p.detach().float().numpy().tobytes() for p in adapter)
        self.report["adapter at the start"] = hashlib.sha256(bits).hexdigest()

    def write(self, trainer) -> None:
        state, optimizer = PartialState(), trainer.optimizer.optimizer
        parameters = list(trainer.model.parameters())
        self.report |= {
            "world": state.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "optimizer": type(optimizer).__name__,
            "partitions gradients": getattr(optimizer, "partition_gradients", None),
            "layers": len(pte_layers(trainer.accelerator.unwrap_model(trainer.model_wrapped))),
            "weights held": sum(held(p) for p in parameters) / sum(whole(p) for p in parameters),
            "optimizer held": optimizer_share(optimizer, sum(whole(p) for p in parameters if p.requires_grad)),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        (self.reports / f"rank{state.process_index}.json").write_text(json.dumps(self.report))


def joined(parts: list[Rollout]) -> Rollout:
    """Several rollouts as one."""
    keys = ("completion_ids", "logprobs", "schedules", "evictions")
    lists = {key: [x for part in parts for x in getattr(part, key)] for key in keys}
    return replace(parts[0], **lists, seconds=sum(part.seconds for part in parts))


def whole(p) -> int:
    return getattr(p, "ds_numel", p.numel())


def held(p) -> int:
    """Elements of a parameter that lie on this rank between two steps."""
    if isinstance(p, DTensor):
        return p.to_local().numel()
    return p.ds_tensor.numel() if hasattr(p, "ds_tensor") and not p.numel() else p.numel()


def optimizer_share(optimizer, trained: int) -> float:
    """Share of the trained weights for which this rank keeps the optimizer's state."""
    parts = getattr(optimizer, "single_partition_of_fp32_groups", None) or getattr(
        optimizer, "fp32_partitioned_groups_flat", None
    )
    if parts is None:
        parts = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(held(p) for p in parts) / trained


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for two minutes
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_a_cpu()
    torch.set_num_threads(1)
    probe, calibrate = Probe(Path(sys.argv[1])), pte_trl.training.mixin.calibrate_encoders
    pte_trl.training.generation.rollout = probe.rollout
    pte_trl.training.mixin.calibrate_encoders = probe.calibrate
    grpo_pte.AccuracyReward = lambda grader: reward
    probe.write(grpo_pte.main(sys.argv[2:]))
