"""ZeRO-3 and FSDP2 with a model that runs many times in one step, also inside backward (`replay: segments`).

Both engines gather a layer's weights when it is entered, forward and backward, and every rank takes part. So all ranks
have to run the model equally often. And both take a forward inside backward for gradient checkpointing's, after which
the weights are needed at once: they would keep the whole model gathered. Here each layer lets go of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from pte_trl.compat.engines import release_backward_leftovers, zero3_part
from pte_trl.compat.torch import reshards_after_forward


def lockstep_of(wrapper: nn.Module) -> "Lockstep | None":
    """What `segment_logps` needs under the engine of this model; None where every rank holds all weights.

    Args:
        wrapper: the model as the engine wraps it; without gradients also the bare model.
    """
    units = [module for module in wrapper.modules() if isinstance(module, FSDPModule)]
    zero3 = any(zero3_part(parameter) is not None for parameter in wrapper.parameters())
    return Lockstep(wrapper, units, zero3) if units or zero3 else None


class Lockstep:
    """A `pte_trl.replay.segments.Lockstep`."""

    def __init__(self, wrapper: nn.Module, units: list[FSDPModule], zero3: bool):
        self.wrapper, self.units, self.zero3 = wrapper, units, zero3

    def most(self, count: int, device: torch.device) -> int:
        """The largest `count` of all ranks, each of which calls this; `device` is where they talk to each other."""
        counts = torch.tensor(count, device=device)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A context around the backward passes of all segments.

        FSDP2 reduces the gradients of every segment, and adds them up in the optimizer's precision. A segment that
        begins with no eviction has none for the encoder, but another rank's may: they count as zeros. ZeRO-3 would
        take each segment's for all there are: here they stay on the rank until the context is left.
        """
        self.release()
        hooks = []
        for unit in filter(reshards_after_forward, self.units):
            if not any(isinstance(inner, FSDPModule) for inner in unit.modules() if inner is not unit):
                hooks.append(unit.register_forward_pre_hook(every_weight_used))  # a layer; the whole model has them
            hooks.append(unit.register_forward_hook(lambda unit, *_: unit.reshard()))
        try:
            with self.wrapper.coalesce_grad_reduction() if self.zero3 else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def release(self) -> None:
        """Lets go of the weights that the backward of one segment has left gathered."""
        if self.zero3:
            release_backward_leftovers(self.wrapper)


def every_weight_used(unit: nn.Module, inputs: tuple) -> tuple:
    """A forward pre-hook: adds zero times every trained weight to what enters the layer.

    FSDP2 reduces gradients where there are some. Newer versions of PyTorch can be told to fill in zeros.
    """
    zero = sum(0 * p.sum() for p in unit.parameters() if p.requires_grad)
    return (inputs[0] + zero.to(inputs[0].dtype), *inputs[1:]) if isinstance(zero, torch.Tensor) else inputs
