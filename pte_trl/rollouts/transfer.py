"""Numbers of the host on the device, without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def uploaded(numbers: Sequence | Tensor, device: torch.device) -> Tensor:
    """The numbers as a tensor on `device`.

    `torch.tensor(numbers, device=...)` copies from pageable memory, for which the host waits until the GPU has done
    everything queued before. A copy from pinned memory is queued like a kernel.
    """
    host = torch.as_tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
