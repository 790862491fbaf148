"""Tensors from the host to the device and back, without the host waiting for the device.

A copy from or to pageable memory is staged: the host waits until the GPU has done everything queued before. One with
pinned memory is queued like a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def uploaded(numbers: Sequence | Tensor, device: torch.device) -> Tensor:
    """The numbers, which are on the host, as a tensor on `device`; for those that `torch.tensor(..., device=...)`
    would copy from pageable memory."""
    host = torch.as_tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def offloaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from a GPU on the CPU, in pinned memory, for `fetched` alone.

    The host must not read what it returns: the copy may still be under way. The GPU may, since it copies in order, and
    the memory of `tensor` is free for what is queued behind the copy.
    """
    if tensor.device.type != "cuda" or device.type != "cpu":
        return tensor.to(device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def fetched(tensor: Tensor, device: torch.device) -> Tensor:
    """What `offloaded` has stored, back on `device`.

    All of it, not a slice: a slice would first be made contiguous, by the host and in pageable memory.
    """
    return tensor.to(device, non_blocking=True)
