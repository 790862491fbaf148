"""Two reductions over the vocabulary, as operations of PyTorch with a kernel for CUDA.

On a CPU they take a few rows at a time, so that what is written in between stays in the processor's cache. On CUDA
Triton kernels (`pte_trl.rollouts.chunk_kernels`) keep it in registers. Where Triton cannot compile, CUDA runs
PyTorch's operations, for many rows at a time. Each of the two is one node for `torch.compile`.
"""

from functools import cache

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

CHUNK = 512  # logits whose sum is written
HEAD = 1024  # largest logits of a row in which the end of the nucleus is looked for first, on a CPU
# Elements that are worked on at once: about what a CPU's second-level cache holds; on CUDA what is never short.
AT_ONCE = {"cpu": 2**18, "cuda": 2**25}
# Low bits of a float32 that are zero in every value of a dtype, and so are not searched. float64 becomes float32.
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 12}


# Bits of the cut that CUDA's kernels find by each read of the logits: more is more arithmetic and fewer reads. The
# last reads of float32 skip nearly all logits.
LEVEL_BITS = {torch.bfloat16: (4, 4, 4, 4), torch.float16: (5, 5, 5, 5), torch.float32: (5, 5, 5, 5, 6, 6)}


def level_bits(dtype: torch.dtype) -> tuple[int, ...]:
    return LEVEL_BITS.get(dtype, LEVEL_BITS[torch.float32])


def reads(dtype: torch.dtype) -> int:
    """How often the kernels of `nucleus_cut` read the logits at most."""
    return len(level_bits(dtype))


def _parts(logits: Tensor, *of_rows: Tensor | None):
    """The rows of all arguments, a few at a time."""
    count = max(1, AT_ONCE.get(logits.device.type, 2**18) // max(1, logits.shape[1]))
    for at in range(0, len(logits), count):
        yield tuple(None if x is None else x[at : at + count] for x in (logits, *of_rows))


def plain_chunk_sums(logits: Tensor, scale: float, cut: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mass of each chunk, from one read of the logits.

    Args:
        logits: (batch, vocabulary); what follows is computed in float32.
        scale: the temperature.
        cut: (batch,) float32; only logits above it are summed. All, if None.

    Returns:
        the largest of logits / scale in each chunk, of all its logits, and the sum of exp(logits / scale - that),
        (batch, chunks) float32; how many logits are equal to `cut`, (batch, chunks) int64.
    """
    shape = (len(logits), -(-logits.shape[1] // CHUNK))
    found = logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)
    ties = logits.new_zeros(shape, dtype=torch.long)
    for some, low, *results in _parts(logits, cut, *found, ties):
        _sums_of_rows(some, scale, low, *results)
    return *found, ties


def _sums_of_rows(logits: Tensor, scale: float, cut: Tensor | None, maxes: Tensor, sums: Tensor, ties: Tensor) -> None:
    def chunked(x: Tensor, filler: float) -> Tensor:
        chunks = maxes.shape[1]
        return pad(x, (0, chunks * CHUNK - x.shape[1]), value=filler).unflatten(1, (chunks, CHUNK))

    logits = logits.float()
    scaled = chunked(logits / scale if scale != 1 else logits, -torch.inf)
    torch.amax(scaled, -1, out=maxes)
    # In a chunk of -inf alone every difference would be NaN.
    weights = (scaled - maxes.masked_fill(maxes == -torch.inf, 0).unsqueeze(-1)).exp_()
    if cut is not None:
        low = cut.unsqueeze(1)
        weights.masked_fill_(chunked(logits <= low, 0), 0)
        torch.sum(chunked(logits == low, 0), -1, out=ties)
    torch.sum(weights, -1, out=sums)


def plain_nucleus_cut(
    logits: Tensor, scale: float, maxes: Tensor, peak: Tensor, total: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest logit at and above which the mass reaches `target`, and the mass of what lies above it.

    A CPU sorts the head of a row, and the whole row only where the nucleus is longer. In a captured graph there is no
    such choice, and a sort of the whole vocabulary moves more bytes than all the rest. So the kernels for CUDA search
    the bits of the answer, a few in each read of the logits, until it is exact. The number of reads is fixed, but
    chunks whose largest logit is below the answer are left out once that is known. The sums are in a fixed order.
    Without Triton, CUDA sorts.

    Args:
        logits: (batch, vocabulary).
        scale: the temperature.
        maxes: (batch, chunks) float32, as `chunk_sums` returns them.
        peak: (batch,) float32, the largest of them.
        total: (batch,) float64, the mass of all logits, in units of exp(peak).
        target: (batch,) float64, in units of exp(peak); positive.

    Returns:
        float32 and float64, (batch,).
    """
    cut, above = torch.empty_like(peak), torch.empty_like(target)
    for some, *rest, low, over in _parts(logits, peak, target, cut, above):
        peaks, targets = rest
        if logits.device.type != "cpu":
            low[:], over[:], _ = _end(some.float().sort(1, descending=True).values, scale, peaks, targets)
            continue
        low[:], over[:], found = _end(some.float().topk(min(HEAD, some.shape[1])).values, scale, peaks, targets)
        for row in (~found).nonzero().flatten().tolist():
            at = slice(row, row + 1)
            ordered = some[at].float().sort(1, descending=True).values
            low[at], over[at], _ = _end(ordered, scale, peaks[at], targets[at])
    return cut, above


def _end(ordered: Tensor, scale: float, peak: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sum of descending logits reaches the target: cut and mass above as in `nucleus_cut`, and whether."""
    masses = ((ordered / scale).double() - peak.double().unsqueeze(1)).exp()
    reached = masses.cumsum(1)
    at = torch.searchsorted(reached, target.unsqueeze(1)).clamp(max=ordered.shape[1] - 1)
    cut = ordered.gather(1, at)
    return cut.squeeze(1), masses.masked_fill(ordered <= cut, 0).sum(1), reached[:, -1] >= target


# As operations of PyTorch: `chunk_sums` and `nucleus_cut` are what everybody calls.
chunk_sums = custom_op("pte_trl::chunk_sums", plain_chunk_sums, mutates_args=())
nucleus_cut = custom_op("pte_trl::nucleus_cut", plain_nucleus_cut, mutates_args=())

# ---- other devices -------------------------------------------------------------------------------------------------


@chunk_sums.register_fake
def _(logits, scale, cut):
    shape = (logits.shape[0], -(-logits.shape[1] // CHUNK))
    maxes = logits.new_empty(shape, dtype=torch.float32)
    return maxes, torch.empty_like(maxes), logits.new_empty(shape, dtype=torch.long)


@nucleus_cut.register_fake
def _(logits, scale, maxes, peak, total, target):
    return torch.empty_like(peak), torch.empty_like(target)


@cache
def _kernels(device: torch.device):
    """The module of kernels if they compile and run here; None, and a line that says so, if not."""
    try:
        from pte_trl.rollouts import chunk_kernels

        logits = torch.zeros(1, CHUNK, device=device)
        maxes, sums, _ = chunk_kernels.chunk_sums(logits, 1.0, None)
        total = sums[:, 0].double()
        chunk_kernels.nucleus_cut(logits, 1.0, maxes, maxes[:, 0], total, total / 2)
    except torch.OutOfMemoryError:  # says nothing about the compiler, and may succeed another time
        raise
    except Exception as error:  # no Triton, no C compiler, an unknown GPU: it differs between machines
        print(f"sampling: Triton kernels do not run here, using PyTorch's operations ({error!r})", flush=True)
        return None
    return chunk_kernels


@chunk_sums.register_kernel("cuda")
def _(logits, scale, cut):
    kernels = _kernels(logits.device)
    return (kernels.chunk_sums if kernels else plain_chunk_sums)(logits, scale, cut)


@nucleus_cut.register_kernel("cuda")
def _(logits, scale, maxes, peak, total, target):
    kernels = _kernels(logits.device)
    return (kernels.nucleus_cut if kernels else plain_nucleus_cut)(logits, scale, maxes, peak, total, target)
