"""A training run in which something happens at a named moment: `recipes/grpo_pte.py`, with FAULT in the environment.

    FAULT=backward:4:1:SIGKILL accelerate launch ... -m tests.faulty --config recipes/tiny.yaml ...

FAULT is moment:step:rank:what. The moment is a key of `MOMENTS`; `what` is a signal, LAUNCHER- and a signal for the
process that started this one, or a number (nan, inf) for the moments that have one to spoil. Nothing in the package
knows of this file.
"""

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from pte_trl.rewards.worker_pool import WorkerPool
from pte_trl.runtime import checkpoints
from pte_trl.runtime.watch import RankWatch
from pte_trl.training import grpo as grpo_pte
from pte_trl.training.trainer import PteGRPOTrainer


class Fault:
    """What FAULT says, in the process and at the step it is meant for."""

    def __init__(self, text: str):
        self.moment, step, rank, self.what = text.split(":")
        self.step, self.rank, self.fired, self.trainer = int(step), int(rank), False, None

    def now(self) -> bool:
        """Whether the step under way is the one; steps count from 1."""
        here = self.trainer.args.process_index == self.rank and self.trainer.state.global_step + 1 == self.step
        return here and not self.fired

    def fire(self, *_) -> None:
        if self.fired:
            return
        self.fired = True
        whom = os.getppid() if self.what.startswith("LAUNCHER-") else os.getpid()
        os.kill(whom, signal.Signals[self.what.removeprefix("LAUNCHER-")])


def before(owner, name: str, action) -> None:
    """Calls `action(self, *args)` ahead of a method or function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


# ---- moments ---------------------------------------------------------------------------------------------------


def in_rollout(fault: Fault) -> None:
    """When the model is called for the tenth time in a rollout: some tokens are sampled, others are not."""
    calls = []

    def count(module, args):
        calls.append(1)
        if len(calls) == 10:
            fault.fire()

    def arm(trainer, *_):
        if fault.now():
            trainer.model.register_forward_pre_hook(count)

    before(PteGRPOTrainer, "_generate_single_turn", arm)


def trainable(trainer) -> torch.Tensor:
    """A trainable tensor of the lowest layer, which backward reaches last."""
    return next(p for p in trainer.model.parameters() if p.requires_grad)


def in_backward(fault: Fault) -> None:
    def watch(layer, args, out):
        if out.requires_grad:
            out.register_hook(fault.fire)

    def arm(trainer, *_):
        if not fault.now():
            return
        if isinstance(trainable(trainer), DTensor):  # FSDP2 writes gradients of its own into shards: no hook runs
            layer = next(m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer))
            layer.register_forward_hook(watch)
        else:
            trainable(trainer).register_hook(fault.fire)

    before(PteGRPOTrainer, "_compute_loss", arm)


def after_optimizer(fault: Fault) -> None:
    """Weights are new, the step is not counted yet."""
    before(PteGRPOTrainer, "_get_learning_rate", lambda trainer: fault.fire() if fault.now() else None)


def while_saving(fault: Fault) -> None:
    """Half of the first file of this rank that torch writes is there. The step is over: the next one is under way."""
    original = torch.save

    def half(content, path, *args, **kwargs):
        if fault.now():
            whole = io.BytesIO()
            original(content, whole)
            Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
            fault.fire()
        return original(content, path, *args, **kwargs)

    torch.save = half


def before_rename(fault: Fault) -> None:
    before(checkpoints, "publish", lambda *_: fault.fire() if fault.now() else None)


def before_rotation(fault: Fault) -> None:
    """The new checkpoint is in its place, the oldest is not deleted yet."""
    before(checkpoints, "rotate", lambda *_: fault.fire() if fault.now() else None)


def in_rotation(fault: Fault) -> None:
    """The oldest checkpoint is half deleted."""

    def half(folder, *args, **kwargs):
        found = [path for path in Path(folder).rglob("*") if path.is_file()]
        if fault.now() and found:
            for path in found[: len(found) // 2]:
                path.unlink()
            fault.fire()

    before(checkpoints, "rotate", lambda *_: before(shutil, "rmtree", half) if fault.now() else None)


def on_full_disk(fault: Fault) -> None:
    """From here on no file may be larger than so many bytes: what a full disk does to the largest one."""

    def limit(trainer, *_):
        if fault.now():
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.what), resource.RLIM_INFINITY))

    before(PteGRPOTrainer, "_save_checkpoint", limit)


def in_grading(fault: Fault) -> None:
    """A worker of the grader has ended when the completions come."""

    def end(pool, jobs):
        for pid in pool.pids() if fault.trainer and fault.now() else ():
            os.kill(pid, signal.Signals[fault.what])

    before(WorkerPool, "run", end)


def spoil(weights: torch.Tensor, what: str) -> None:
    with torch.no_grad():
        weights.fill_(float(what))


def in_weights(fault: Fault) -> None:
    """Weights that are not finite, so that the logits of the next rollout are not."""
    before(
        PteGRPOTrainer,
        "_generate_single_turn",
        lambda trainer, *_: spoil(trainable(trainer), fault.what) if fault.now() else None,
    )


def in_logps(fault: Fault) -> None:
    """Weights that are spoilt between the rollout and the scoring."""
    before(
        PteGRPOTrainer,
        "_compute_loss",
        lambda trainer, *_: spoil(trainable(trainer), fault.what) if fault.now() else None,
    )


def in_gradient(fault: Fault) -> None:
    """The gradient of one sample, by its advantage."""

    def arm(trainer, model, inputs):
        if fault.now():
            inputs["advantages"][2] = float(fault.what)
            fault.fired = True

    before(PteGRPOTrainer, "_compute_loss", arm)


def in_reward(fault: Fault) -> None:
    """One reward of the format reward."""
    original = grpo_pte.FormatReward.__call__

    def spoilt(self, completions, trainer_state=None, **kwargs):
        rewards = original(self, completions, **kwargs)
        if fault.now():
            rewards[1] = None if fault.what == "none" else float(fault.what)
        return rewards

    grpo_pte.FormatReward.__call__ = spoilt


MOMENTS = {
    "rollout": in_rollout,
    "backward": in_backward,
    "optimizer": after_optimizer,
    "saving": while_saving,
    "rename": before_rename,
    "published": before_rotation,
    "rotation": in_rotation,
    "disk": on_full_disk,
    "grading": in_grading,
    "weights": in_weights,
    "logps": in_logps,
    "gradient": in_gradient,
    "reward": in_reward,
}


class Witness(TrainerCallback):
    """Writes down what really runs: a launch may silently be another engine's, or one process's."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.process_index == 0:
            kinds = {"wrapped": type(self.trainer.model_wrapped).__name__, "world": args.world_size}
            kinds["optimizer"] = type(getattr(optimizer, "optimizer", optimizer)).__name__
            (Path(args.output_dir) / "engine.json").write_text(json.dumps(kinds))


def main(argv: list[str] | None = None) -> None:
    fault = Fault(os.environ["FAULT"]) if os.environ.get("FAULT") else None
    if limit := os.environ.get("RANK_WATCH_LIMIT"):
        RankWatch.limit, RankWatch.interval = float(limit), float(limit) / 10
    if fault:
        MOMENTS[fault.moment](fault)
    original = PteGRPOTrainer.__init__

    def keep(trainer, *args, **kwargs):
        original(trainer, *args, **kwargs)
        witness = Witness()
        witness.trainer = trainer
        trainer.add_callback(witness)
        if fault:
            fault.trainer = trainer

    PteGRPOTrainer.__init__ = keep
    with contextlib.suppress(ImportError, KeyError):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from tests.engine_probe import allow_fsdp_on_a_cpu

        allow_fsdp_on_a_cpu()
    grpo_pte.main(argv)


if __name__ == "__main__":
    main()
