"""Triton kernels of `pte_trl.rollouts.chunks`. To be imported where Triton is installed only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pte_trl.rollouts.chunks import CHUNK, UNUSED_BITS, level_bits, reads

BLOCK = 256  # logits that are compared with all levels at once


@triton.jit
def _chunk_sums(logits, stride, vocabulary, scale, cut, maxes, sums, ties, HAS_CUT: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of one row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
    y = x / scale
    largest = tl.max(y, 0)
    weight = tl.exp(y - tl.where(largest == float("-inf"), 0.0, largest))  # -inf alone would make NaN
    out = row * tl.num_programs(1) + chunk
    if HAS_CUT:
        low = tl.load(cut + row)
        weight = tl.where(x <= low, 0.0, weight)
        tied = (x == low) & (place < vocabulary)
        tl.store(ties + out, tl.sum(tied.to(tl.int32), 0).to(tl.int64))
    tl.store(maxes + out, largest)
    tl.store(sums + out, tl.sum(weight, 0))


@triton.jit
def _sortable(x):
    """Floats as integers of 0 to 2**32 - 1 in the same order."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF  # -0 equals 0
    return tl.where(bits < 0x80000000, bits + 0x80000000, 0xFFFFFFFF - bits)


@triton.jit
def _nucleus_cut(
    logits, stride, scale, peak, target, cut, above,
    VOCABULARY: tl.constexpr, UNUSED: tl.constexpr, BITS: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. Before each read the cut is known to lie in [low, low + 2**known), as sortable integers."""
    row = tl.program_id(0).to(tl.int64)
    top, goal = tl.load(peak + row), tl.load(target + row)
    levels = tl.arange(0, 1 << BITS)
    low = row * 0
    over = goal * 0.0  # the mass of [low + 2**known, infinity)
    known = tl.program_id(0) * 0 + 32
    for _ in range(READS):
        step = tl.maximum(known - BITS, UNUSED)
        masses = tl.zeros([1 << BITS], tl.float64)  # from each level to the end of the interval
        for start in range(0, VOCABULARY, BLOCK):
            place = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * stride + place, mask=place < VOCABULARY, other=float("-inf")).to(tl.float32)
            offset = _sortable(x) - low
            inside = (offset >= 0) & ((offset >> known) == 0)
            if tl.max(inside.to(tl.int32), 0) > 0:  # after a few reads hardly any block has one
                level = tl.where(inside, offset >> step, -1).to(tl.int32)
                weight = tl.exp(x / scale - top)
                parts = tl.where(level[:, None] >= levels[None, :], weight[:, None], 0.0)
                masses += tl.sum(parts, 0).to(tl.float64)
        # Masses fall with the level. The last one from which the goal is reached:
        best = tl.maximum(tl.sum((over + masses >= goal).to(tl.int32), 0) - 1, 0)
        over += tl.sum(tl.where(levels == best + 1, masses, 0.0), 0)
        low += best.to(tl.int64) << step
        known = step
    # Of a negative number the unused bits are ones here. Sums that miss the goal by rounding leave `low` at 0.
    lowest_float = 0x007FFFFF  # -inf
    negative = 0xFFFFFFFF - tl.maximum(low + ((1 << UNUSED) - 1), lowest_float)
    bits = tl.where(low < 0x80000000, negative, low - 0x80000000)
    tl.store(cut + row, bits.to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(above + row, over)


def chunk_sums(logits: Tensor, scale: float, cut: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    shape = (rows, triton.cdiv(vocabulary, CHUNK))
    maxes, sums = (logits.new_empty(shape, dtype=torch.float32) for _ in range(2))
    ties = logits.new_zeros(shape, dtype=torch.long)
    low = maxes if cut is None else cut.contiguous()
    with torch.cuda.device_of(logits):
        _chunk_sums[shape](
            logits, logits.stride(0), vocabulary, float(scale), low, maxes, sums, ties, cut is not None, CHUNK
        )
    return maxes, sums, ties


def nucleus_cut(logits: Tensor, scale: float, peak: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    peak, target = peak.contiguous(), target.contiguous()
    cut, above = torch.empty_like(peak), torch.empty_like(target)
    unused = UNUSED_BITS.get(logits.dtype, 0)
    with torch.cuda.device_of(logits):
        _nucleus_cut[len(logits),](
            logits, logits.stride(0), float(scale), peak, target, cut, above,
            logits.shape[1], unused, level_bits(logits.dtype), reads(logits.dtype), BLOCK, num_warps=8,
        )  # fmt: skip
    return cut, above
