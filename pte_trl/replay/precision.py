"""Autocast around operations that it does not know: `torch.autograd.Function`s and kernels of our own.

Autocast follows the caller. A backward that is called inside of it runs under it as well, and would round the products
of a backward whose forward was not rounded, or meet two dtypes where one is expected. So each of our functions says
for both passes in which precision it works (`own_precision`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products keep their operands' precision; free where autocast is off anyway."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def cast_by_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as it does for `scaled_dot_product_attention`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def own_precision(function: Callable) -> Callable:
    """Decorator for forward and backward of an `autograd.Function`: both run without autocast.

    `torch.amp.custom_fwd` and `custom_bwd` do this for one kind of device, which they have to be told beforehand.
    """

    @wraps(function)
    def run(ctx, *arguments):
        with without_autocast(next(x for x in arguments if isinstance(x, Tensor)).device):
            return function(ctx, *arguments)

    return run
