"""PTE under engines that shard the weights (DeepSpeed ZeRO-3, FSDP2): who gathers what, and when.

How often a layer calls its own linears follows from how many evictions its samples went through, and that differs
from rank to rank. So nothing smaller than a decoder layer may be gathered for itself, or the ranks would wait for
each other in different places, forever. FSDP2 wraps decoder layers anyway; ZeRO-3 has to be configured. A rollout
stops when its last completion does, so no rank can wait for another in it: it runs with whole weights.
"""

from collections.abc import Callable
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.model import pte_layers
from pte_trl.compat.engines import gather_as_one, keep_output_dtype
from pte_trl.compat.torch import reshards_after_forward
from pte_trl.compat.trl import distributed_backend


def check_engine(args, engine: str | None) -> None:
    """Refuses what would make ranks wait for each other forever.

    Args:
        engine: as `pte_trl.runtime.launch.Launch` names it.

    Raises:
        ValueError: naming the setting, the engine and what is allowed.
    """
    if args.method == "lora":
        return
    if engine == "FSDP1":
        raise ValueError(
            f"fsdp_version=1: a rollout of method={args.method} ends at another token on every rank, and FSDP1 "
            "gathers weights at each; allowed is 2 (accelerate_configs/fsdp2.yaml)"
        )
    if engine == "ZeRO-3" and not args.ds3_gather_for_generation:
        raise ValueError(
            f"ds3_gather_for_generation=false under ZeRO-3: a rollout of method={args.method} ends at another token "
            "on every rank and needs whole weights; allowed is true"
        )


def prepare_engine(trainer) -> None:
    """Configures the engine before it is made; nothing to do for DDP and ZeRO-1/2."""
    backend = distributed_backend(trainer)
    if backend.is_zero3:
        gather_by_layer(trainer.model)
    if backend.is_fsdp:
        # accelerate hands every entry of the state dict to the ranks as a sharded tensor, which a buffer is not.
        for layer in pte_layers(trainer.model):
            for encoder in layer.pte_encoder.values():
                encoder.fitted_as_parameters()
        # FSDP2 would round what the model returns to bfloat16, and log-probs by up to 0.016 with it.
        keep_output_dtype(trainer.accelerator)


def gather_by_layer(model: nn.Module) -> None:
    """Makes every decoder layer with PTE one unit of ZeRO-3, gathered when it is entered, released when it is left."""
    layers = [m for m in model.modules() if any(isinstance(child, PteAttention) for child in m.children())]
    for layer in layers:
        gather_as_one(layer)
    if layers:
        # DeepSpeed reduces a unit's gradients when the gradient of its input is there. Without one, it would reduce
        # those of the first layer before they are computed.
        model.enable_input_require_grads()


@contextmanager
def whole_weights(model: nn.Module):
    """FSDP2 with all weights gathered, so that forwards need no other rank; does nothing without FSDP2.

    ZeRO-3 has the same from TRL (`unwrap_model_for_generation`).
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    released = [m for m in units if reshards_after_forward(m)]
    for unit in released:
        unit.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for unit in released:
            unit.set_reshard_after_forward(True, recurse=False)


def rollout_engine_must_go(trainer, fits: bool) -> bool:
    """Whether training wants the rollout engine's memory, or the weights will lie elsewhere in the next rollout.

    Args:
        fits: whether there is room for a training step beside it. It has to be there under `rollout_batch_size: auto`
            alone: a stated size keeps the engine, and the memory that a run prints counts it.
    """
    backend, replay = distributed_backend(trainer), getattr(trainer, "replay", None)
    short = (replay and replay.kind == "segments") or (trainer.args.rollout_batch_size == "auto" and not fits)
    return backend.is_zero3 or backend.is_fsdp or short


def call_inside(wrapper: nn.Module, module: nn.Module, function: Callable, **inputs):
    """`function(**inputs)` in place of the forward of `module`, inside that of `wrapper`.

    What DDP or DeepSpeed do around a forward, so that gradients are averaged, is then done around `function`, which
    may call `module` as often as it likes.
    """
    if wrapper is module:
        return function(**inputs)
    own = module.__dict__.get("forward")  # accelerate and TRL put their forwards on the instance

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    def instead(**inputs):
        restore()
        return function(**inputs)

    module.forward = instead
    try:
        return wrapper(**inputs)
    finally:
        restore()
