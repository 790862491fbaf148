"""The recursion over evictions as one kernel of Triton's, forward and backward (`pte_trl.adapter.recursion`).

A program holds the entries under one norm and goes through the evictions: a sample's whole state for "rms", one row
of it for "row". Without Triton, without a GPU or in another dtype than float32 the recursion does without.
"""

import logging
import os
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

logger = logging.getLogger(__name__)
MOST = 8192  # entries under one norm, which lie in registers
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own interpreter, on a CPU


def usable(updates: Tensor, normalisation: str) -> bool:
    """Whether the kernel takes these updates, (batch, J, n_g, r)."""
    if triton is None or updates.dtype != torch.float32 or updates.numel() == 0:
        return False
    on_device = updates.is_cuda or INTERPRETED
    return on_device and _entries(updates, normalisation) <= MOST and compiles(updates.device)


@cache
def compiles(device: torch.device) -> bool:
    """Whether both kernels compile and run on the device; if not, the reason is logged, once."""
    start, updates = torch.ones(2, 2, device=device), torch.ones(1, 2, 2, 2, device=device)
    try:
        states = forward(start, updates, "rms", 0.0)
        found = backward(start, updates, states, torch.ones_like(states), "rms", 0.0)
        if not ((states - 1).abs() < 1e-5).all() & (found.abs() < 1e-5).all():
            raise RuntimeError("its results are wrong")
        return True
    except torch.OutOfMemoryError:  # says nothing about the compiler, and may succeed another time
        raise
    except Exception as error:  # a compiler raises whatever it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Triton does not run here, the state of PTE is computed step by step: %s", reason)
        return False


def forward(start: Tensor, updates: Tensor, normalisation: str, eps: float) -> Tensor:
    """States after every eviction, (batch, J, n_g, r); arguments as `recursion` has them."""
    start, updates = _whole(start, updates), updates.contiguous()
    states = torch.empty_like(updates)
    _launch(_forward, updates, normalisation, start, updates, states, eps)
    return states


def backward(start: Tensor, updates: Tensor, states: Tensor, grad: Tensor, normalisation: str, eps: float) -> Tensor:
    """Gradients of the updates for those of the states, (batch, J, n_g, r) both."""
    start, updates = _whole(start, updates), updates.contiguous()
    found = torch.empty_like(updates)
    _launch(_backward, updates, normalisation, start, updates, states, grad.contiguous(), found, eps)
    return found


def _whole(start: Tensor, updates: Tensor) -> Tensor:
    return start.expand(updates.shape[0], -1, -1).contiguous()


def _entries(updates: Tensor, normalisation: str) -> int:
    return updates.shape[2:].numel() if normalisation == "rms" else updates.shape[3]


def _launch(kernel, updates: Tensor, normalisation: str, *arguments) -> None:
    batch, evictions, *state = updates.shape
    entries = _entries(updates, normalisation)
    parts = torch.Size(state).numel() // entries
    block = triton.next_power_of_2(entries)
    warps = min(8, max(1, block // 256))
    with torch.cuda.device_of(updates):  # Triton launches on the current device
        kernel[(batch * parts,)](*arguments, evictions, parts, entries, BLOCK=block, num_warps=warps)


if triton is not None:

    @triton.jit
    def _forward(start, updates, states, eps, evictions, parts, entries, BLOCK: tl.constexpr):
        sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
        at = tl.arange(0, BLOCK)
        inside, size = at < entries, parts * entries
        at += part * entries
        state = tl.load(start + sample * size + at, mask=inside, other=0.0)
        for k in range(evictions):
            place = (sample * evictions + k).to(tl.int64) * size + at
            state += tl.load(updates + place, mask=inside, other=0.0)
            state *= 1.0 / tl.sqrt(tl.sum(state * state, 0) / entries + eps)
            tl.store(states + place, state, mask=inside)

    @triton.jit
    def _backward(start, updates, states, grads, found, eps, evictions, parts, entries, BLOCK: tl.constexpr):
        sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
        at = tl.arange(0, BLOCK)
        inside, size = at < entries, parts * entries
        at += part * entries
        first = tl.load(start + sample * size + at, mask=inside, other=0.0)
        later = tl.zeros([BLOCK], dtype=tl.float32)
        for step in range(evictions):
            k = evictions - 1 - step
            place = (sample * evictions + k).to(tl.int64) * size + at
            state = tl.load(states + place, mask=inside, other=0.0)
            before = tl.load(states + place - size, mask=inside & (k > 0), other=0.0)
            before = tl.where(k > 0, before, first) + tl.load(updates + place, mask=inside, other=0.0)
            scale = 1.0 / tl.sqrt(tl.sum(before * before, 0) / entries + eps)
            whole = later + tl.load(grads + place, mask=inside, other=0.0)
            later = scale * (whole - state * (tl.sum(whole * state, 0) / entries))
            tl.store(found + place, later, mask=inside)
