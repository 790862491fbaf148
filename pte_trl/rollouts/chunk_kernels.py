"""Triton kernels of `pte_trl.rollouts.chunks`. To be imported where Triton is installed only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pte_trl.rollouts.chunks import CHUNK, UNUSED_BITS, level_bits

TILE = 2048  # logits of one program of `nucleus_cut`; a multiple of CHUNK
WARPS = 4  # of such a program


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
def _float(unit, UNUSED: tl.constexpr):
    """The float32 of a sortable integer without its unused bits. Of a negative number these are ones here."""
    low = unit << UNUSED
    bits = tl.where(low < 0x80000000, 0xFFFFFFFF - (low + ((1 << UNUSED) - 1)), low - 0x80000000)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _bounds(scale, vocabulary, peak, total, target, low, high, above, UNUSED: tl.constexpr):
    """[low, high) that holds the cut of one row, in sortable integers without the unused bits.

    Logits below `bound` have too little mass, all together, to be needed. Where that is lost in rounding it is -inf.
    """
    row = tl.program_id(0)
    top, whole = tl.load(peak + row), tl.load(total + row)
    spare = ((whole - tl.load(target + row)) / 2 - whole * 1e-6).to(tl.float32)
    margin = tl.abs(top * scale) * 1e-5 + 1e-30  # logits, and their quotients with scale, are rounded
    bound = (top + tl.log(tl.maximum(spare, 0.0) / vocabulary)) * scale - margin
    bound = tl.where(bound > float("-inf"), bound, float("-inf"))  # not NaN
    largest = top * scale + margin
    largest = tl.where(largest < float("inf"), largest, float("inf"))
    tl.store(low + row, _sortable(bound) >> UNUSED)
    tl.store(high + row, (_sortable(largest) >> UNUSED) + 1)
    tl.store(above + row, whole * 0.0)


@triton.jit
def _level_sums(
    logits, stride, vocabulary, scale, peak, maxes, low, high, parts,
    UNUSED: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of one tile of one row: the mass of [low + level * step, high) for each level but the first."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end, top = tl.load(low + row), tl.load(high + row), tl.load(peak + row)
    step = (end - start + LEVELS - 1) // LEVELS
    first, beyond = _float(start, UNUSED), _float(end, UNUSED)
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    chunk = tile * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    largest = tl.max(tl.load(maxes + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), 0)
    levels = tl.arange(0, LEVELS)
    masses = tl.zeros([LEVELS], tl.float32)
    if (end - start > 1) & (largest >= first / scale):  # else there is no need to read the logits
        place = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * stride + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        inside = (x >= first) & ((x >= beyond) == 0)  # `beyond` is NaN where the interval includes infinity
        if tl.max(inside.to(tl.int32), 0) > 0:
            weight = tl.where(inside, tl.exp(x / scale - top), 0.0)
            for level in range(1, LEVELS):
                mass = tl.sum(tl.where(x >= _float(start + level * step, UNUSED), weight, 0.0), 0)
                masses = tl.where(levels == level, mass, masses)
    tl.store(parts + (row * tl.num_programs(1) + tile) * LEVELS + levels, masses)


@triton.jit
def _narrow(
    parts, tiles, target, low, high, above, cut,
    UNUSED: tl.constexpr, LEVELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row: the last level from which the mass reaches the target becomes the interval."""
    row = tl.program_id(0).to(tl.int64)
    start, end, over = tl.load(low + row), tl.load(high + row), tl.load(above + row)
    step = (end - start + LEVELS - 1) // LEVELS
    levels, tile = tl.arange(0, LEVELS), tl.arange(0, TILES)
    places = (row * tiles + tile[:, None]) * LEVELS + levels[None, :]
    masses = tl.sum(tl.load(parts + places, mask=tile[:, None] < tiles, other=0.0).to(tl.float64), 0)
    best = tl.sum(((over + masses >= tl.load(target + row)) & (levels > 0)).to(tl.int32), 0)
    start += best * step
    tl.store(low + row, start)
    tl.store(high + row, tl.minimum(end, start + step))
    tl.store(above + row, over + tl.sum(tl.where(levels == best + 1, masses, 0.0), 0))
    tl.store(cut + row, _float(start, UNUSED))


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


def nucleus_cut(
    logits: Tensor, scale: float, maxes: Tensor, peak: Tensor, total: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    maxes, peak, total, target = (x.contiguous() for x in (maxes, peak, total, target))
    rows, vocabulary = logits.shape
    scale, unused, bits = float(scale), UNUSED_BITS.get(logits.dtype, 0), level_bits(logits.dtype)
    tiles = triton.cdiv(vocabulary, TILE)
    cut, above = torch.empty_like(peak), torch.empty_like(target)
    low, high = (torch.empty_like(target, dtype=torch.long) for _ in range(2))
    parts = logits.new_empty(rows * tiles * 2 ** max(bits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _bounds[rows,](scale, vocabulary, peak, total, target, low, high, above, unused, num_warps=1)
        for level in bits:
            _level_sums[rows, tiles](
                logits, logits.stride(0), vocabulary, scale, peak, maxes, low, high, parts,
                unused, 2**level, CHUNK, TILE, num_warps=WARPS,
            )  # fmt: skip
            _narrow[rows,](
                parts, tiles, target, low, high, above, cut, unused, 2**level, triton.next_power_of_2(tiles)
            )
    return cut, above
