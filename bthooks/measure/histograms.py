"""Histograms: a tensor -> at most 288 buckets and six figures on its device. Pure.

The bits of float32 numbers, read as integers, have the order of the numbers. Every value
becomes such a key; the keys are sorted (few) or counted in fine bins (many), and the edges of
the buckets are picked from these by mass and by width.
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dtypes import as_real, widest

_MASS, _WIDTH = 193, 90  # edges by mass; parts of [min, max], three to a bin that is drawn
_SORTED = 10_000  # up to here sorting costs less than the fine bins, or as much on one thread
_FEW = 1024
_BINS = 1 << 17  # 8 or 9 bits of mantissa if there are both signs, more if not
_CHUNK = 1 << 19  # computed at a time: bounds the memory; 10 to 20 % faster than 1 << 20
_NARROW = {torch.float16, torch.bfloat16, torch.float32}
_LARGEST = torch.finfo(torch.float32).max
_MINUS_INF, _MAGNITUDE = -0x7F800000, 0x7FFFFFFF


class Histogram(NamedTuple):
    """Buckets (limits[i - 1], limits[i]], some empty, and a summary of the finite values."""

    limits: Tensor  # (B,) right edges, non-decreasing, float64 (float32 on mps)
    counts: Tensor  # (B,) finite values in each, int64
    summary: Tensor  # (6,) min, max, num, sum, sum_squares, nonfinite; dtype of limits


@torch.no_grad()
def histogram(tensor: Tensor, is_part: bool = False) -> Histogram:
    """The distribution of a tensor's finite values, without a read to the host.

    That of a part, which is to be merged with others, has more buckets.

    Values are taken as float32, in which TensorBoard draws; larger ones as the largest float32.
    Complex: real and imaginary parts together. Sparse: the coalesced values.

    >>> raw(histogram(torch.tensor([0.0, 0.0, 1.0, math.nan])))["bucket_counts"]
    [0, 2, 0, 1]

    TensorBoard draws 30 bins over [min, max] and spreads a bucket evenly over its width
    (`histogramCore.ts`). Of the mass that this puts on the wrong side of an edge of these bins
    there is less than 0.1 %.
    """
    values = as_real(tensor.detach()).resolve_neg().reshape(-1)  # (n,)
    device, n = values.device, values.numel()
    wide = widest(device)
    if not n:
        zeros = torch.zeros(6, dtype=wide, device=device)
        return Histogram(zeros[:1], zeros[:1].to(torch.int64), zeros)
    chunks = values.split(_CHUNK)
    clean = device.type == "cpu" and values.dtype in _NARROW
    if clean:
        each = _sums_of_finite(chunks, wide)
        clean = bool(each[2].sum().isfinite())  # nothing waits for what the CPU reads of itself
    if not clean:
        each = torch.stack([_sums(chunk, wide) for chunk in chunks], dim=1)
    lows, highs, sums, squares = each  # (chunks,)
    low, high = lows.amin(), highs.amax()
    parts = torch.linspace(0, 1, _WIDTH + 1, dtype=wide, device=device)
    marks = pad(low.lerp(high, parts), (0, 1)).to(torch.float32)  # (W + 2,) min .. max, 0
    marks = _keys(marks.nan_to_num_())  # none is finite: all 0

    floats = (c.to(torch.float32) if clean else _float(c, -math.inf) for c in chunks)
    edges, below, spare = _sort(*floats) if n <= _SORTED else _count(floats, marks)
    minus_inf = torch.full((1,), _MINUS_INF, dtype=torch.int32, device=device)
    nonfinite = _up_to(minus_inf, edges, below)  # (1,)
    # The fractions (1 - cos(pi k / M)) / 2: steps of 0.007 % at the ends, 0.8 % in the middle.
    mass = _MASS
    if is_part:
        mass = 4 * n if n <= _FEW else _FEW  # each of few values gets an edge on both sides
    fractions = torch.hann_window(2 * mass, dtype=wide, device=device)[1 : mass + 1]
    ranks = (fractions * (n - 1 - nonfinite)).to(torch.int64) + nonfinite  # (M,)
    ranks = ranks.clamp_(max=n - 1)
    keys = _limits(edges, below, spare, marks, ranks)  # (B,)
    counts = _up_to(keys, edges, below).diff(prepend=nonfinite)
    lost = nonfinite[0]
    summary = torch.stack([low, high, n - lost, sums.sum(), squares.sum(), lost])
    # Infinity as the largest number.
    limits = keys.abs().clamp_(max=-_MINUS_INF - 1).view(torch.float32).copysign(keys)
    return Histogram(limits.to(wide), counts, summary)


def compact(hist: Histogram) -> Histogram:
    """The same, on the host, without buckets that are empty, but for those before others."""
    counts = hist.counts
    kept = (counts > 0) | (torch.cat([counts[1:], counts[:1] * 0]) > 0)
    kept[-1] = True
    return Histogram(hist.limits[kept], counts[kept], hist.summary)


def merged(parts: Sequence[Histogram]) -> Histogram:
    """The histogram of what `parts`, on the host, are the histograms of; one is itself.

    Within a bucket of a part its values are taken to be spread evenly.
    """
    parts = [part for part in parts if part.summary[2] + part.summary[5]] or [*parts[:1]]
    if len(parts) == 1:
        return parts[0]
    summaries = torch.stack([part.summary for part in parts]).double()  # (parts, 6)
    low, high = summaries[:, 0].amin(), summaries[:, 1].amax()
    total = summaries[:, 2:].sum(0)
    summary = torch.cat([torch.stack([low, high]), total])
    fractions = torch.linspace(0, 1, _WIDTH + 1, dtype=torch.float64)
    marks = low.lerp(high, fractions) if low.isfinite() else low.new_zeros(1)
    edges = torch.cat([marks, *(part.limits.double() for part in parts)]).unique()  # (E,)
    below = torch.stack([_below(part, edges) for part in parts]).sum(0)
    # Of the edges those by mass, each with the one before it: a heavy value has one on each side.
    ranks = torch.hann_window(2 * _MASS, dtype=torch.float64)[1 : _MASS + 1] * total[0]
    by_mass = torch.searchsorted(below, ranks).clamp_(max=len(edges) - 1)
    by_width = torch.searchsorted(edges, torch.cat([marks, edges[-1:]]))
    kept = torch.cat([by_mass, (by_mass - 1).clamp_(min=0), by_width]).unique()
    counts = below[kept].round().to(torch.int64)
    return Histogram(edges[kept], counts.diff(prepend=counts.new_zeros(1)), summary)


def _below(part: Histogram, at: Tensor) -> Tensor:
    """How many of the values of `part` are up to each of the sorted `at`, float64."""
    limits, counts = part.limits.double(), part.counts.double()  # (B,)
    last = limits.new_full((1,), float(part.summary[0])).minimum(limits[:1])
    left = torch.cat([last, limits[:-1]])
    before = counts.cumsum(0) - counts
    bucket = torch.searchsorted(limits, at).clamp_(max=len(limits) - 1)
    width = (limits - left)[bucket]
    inside = torch.where(width > 0, (at - left[bucket]) / width, (at >= limits[bucket]).double())
    return before[bucket] + counts[bucket] * inside.clamp(0, 1)


def raw(hist: Histogram) -> dict[str, Any] | None:
    """The keyword arguments of `add_histogram_raw`, from tensors on the host; None if num is 0."""
    low, high, num, total, squares, _ = hist.summary.tolist()
    if not num:
        return None
    limits, counts = hist.limits.tolist(), hist.counts.to(torch.int64).tolist()
    kept: list[tuple[float, int]] = []
    last = None
    for limit, count, following in zip(limits, counts, [*counts[1:], 0], strict=True):
        if count or (following and limit != last):  # the left edge of an occupied one
            kept.append((last := limit, count))
    return {
        "min": low,
        "max": high,
        "num": int(num),
        "sum": total,
        "sum_squares": squares,
        "bucket_limits": [limit for limit, _ in kept],
        "bucket_counts": [count for _, count in kept],
    }


def _float(values: Tensor, instead: float) -> Tensor:
    """As float32 within its range, with `instead` for what is NaN or infinite."""
    if values.dtype == torch.float64:  # x - x is NaN where x is infinite, else 0
        values = values.clamp(-_LARGEST, _LARGEST) + (values - values)
    return values.to(torch.float32).nan_to_num(nan=instead, posinf=instead, neginf=instead)


def _sums(values: Tensor, wide: torch.dtype) -> Tensor:
    """(n,) -> (4,): min, max, sum and sum of squares of the finite values."""
    low, high = _float(values, math.inf).amin(), _float(values, -math.inf).amax()
    finite = _float(values, 0.0).to(wide)
    return torch.stack([low, high, finite.sum(), finite.square_().sum()])


def _sums_of_finite(chunks: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """The same of each chunk (4, chunks) in a third of the time; not finite if a value is not."""
    # Used again for each: fresh memory costs more than what is done in it.
    buffer = torch.empty(len(chunks[0]), dtype=wide, device=chunks[0].device)
    sums = []
    for chunk in chunks:
        low, high = torch.aminmax(chunk)
        finite = buffer[: len(chunk)].copy_(chunk)
        sums.append(torch.stack([low.to(wide), high.to(wide), finite.sum(), finite.dot(finite)]))
    return torch.stack(sums, dim=1)


def _keys(values: Tensor, out: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """Float32 numbers as int32 in the same order, both zeros as 0."""
    bits = values.view(torch.int32)
    sign = torch.bitwise_right_shift(bits, 31, out=out[0])
    return torch.bitwise_and(bits, _MAGNITUDE, out=out[1]).bitwise_xor_(sign).sub_(sign)


def _sort(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every value as a fine bin of one key, as `_count` gives them."""
    edges = _keys(values).sort().values
    below = torch.arange(values.numel() + 1, dtype=torch.int64, device=values.device)
    return edges, below, torch.zeros((), dtype=torch.int32, device=values.device)


def _count(chunks: Iterable[Tensor], marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fine bins of 2**s keys: right edges (F,), values up to each (1 + F,), 2**s - 1.

    What is not finite has the key of -inf and lies below the first bin.
    """
    device, low = marks.device, marks[0]
    span = marks[-2].to(torch.int64) - low
    doublings = torch.arange(18, dtype=torch.int64, device=device)
    shift = (span >> doublings > _BINS - 2).sum(dtype=torch.int32)  # the smallest that suffices
    spare = (1 << shift) - 1
    none = ((low + spare) >> shift) - 1

    buffers = torch.empty(2, _CHUNK, dtype=torch.int32, device=device)

    def count(chunk: Tensor) -> Tensor:
        index = _keys(chunk, buffers[:, : len(chunk)].unbind()).add_(spare)
        index = index.bitwise_right_shift_(shift).clamp_(min=none).sub_(none)
        if device.type == "cpu":
            return torch.bincount(index, minlength=_BINS + 1)
        counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=device)
        ones = torch.ones((), dtype=torch.int64, device=device).expand(index.shape)
        return counts.index_add_(0, index, ones)  # here bincount would read back from the device

    below = reduce(Tensor.add_, map(count, chunks)).cumsum_(0)
    edges = torch.arange(_BINS, dtype=torch.int32, device=device).add_(none + 1)
    edges = edges.clamp_(max=_MAGNITUDE >> shift).bitwise_left_shift_(shift)  # without overflow
    return edges, below, spare


def _limits(edges: Tensor, below: Tensor, spare: Tensor, marks: Tensor, ranks: Tensor) -> Tensor:
    """The keys of the buckets' right edges, in order: (B,), B = M + W + 5."""
    mass = edges.take(torch.searchsorted(below[1:], ranks, right=True))  # (M,)
    # A value or fine bin that holds two ranks is heavy: the first becomes its left edge.
    mass = mass - (mass == mass.roll(-1)).to(torch.int32)
    left = torch.cat([marks[::_WIDTH], marks[-1:]]) - 1  # (3,) the left edges of min, max and 0
    keys = torch.cat([mass, marks + spare, left])
    return (keys.clamp_(min=_MINUS_INF + 1 + spare) & ~spare).sort().values


def _up_to(keys: Tensor, edges: Tensor, below: Tensor) -> Tensor:
    """How many values lie up to each key."""
    # Above 200 keys searchsorted starts threads: 8 ms in all on two cores that are busy.
    found = [torch.searchsorted(edges, part, right=True) for part in keys.split(200)]
    return below.take(torch.cat(found))
