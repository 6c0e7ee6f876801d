"""Statistics that need every entry of a delta: largest value, shares, quantiles, histogram.

The product is formed a few rows at a time in one reused buffer. One pass takes the largest value
and counts the entries by the upper 16 bits of their float32 magnitude: 128 logarithmic bins an
octave, from which every threshold, quantile and coarser histogram follows. Counting by bits is as
exact as the product itself and several times as fast as torch.histc.

Quantiles of up to `MAX_SORTED` entries are those of the entries themselves. Beyond, they are
interpolated inside a bin of 0.5 %, which leaves about 1e-5 where entries are many and 1e-3 in a
thin tail; the entries that would determine the rest are gone by then, and a second pass costs as
much as the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..adapter.delta import kronecker
from ..algebra.factors import Factors

CHUNK_ENTRIES = 3 << 17
"""1.5 MB of float32, which stays in a core's cache: the passes after the product cost half."""
MAX_SORTED = 1 << 18
NUM_CODES = 1 << 15
THRESHOLD = 1e-6
#: Times this, the threshold is 2^-20: a border between bins, so that its share is an exact count.
TO_POWER_OF_TWO = 2.0**-20 / THRESHOLD
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Entries:
    """What a scan over all entries of one delta found."""

    count: int
    abs_max: float
    fraction_below_1e6: float
    fraction_below_std: float
    """Share of |entry| < std; 0.683 for a normal distribution."""
    quantiles: dict[float, float]
    """Of |entry|, with linear interpolation between two entries."""
    histogram: tuple[tuple[float, int], ...]
    """(lower edge, entries) of |entry| per quarter octave, ascending; empty bins left out."""


def scan_factors(
    factors: Factors, std: float, should_stop: Callable[[], bool] | None = None
) -> Entries:
    """Scans up @ down without holding it.

    Raises:
        InterruptedError: `should_stop` returned True.
    """
    up, down = (factors.up * TO_POWER_OF_TWO).float(), factors.down.float()
    num_rows = count_rows(down.shape[1])
    buffer = torch.empty(min(num_rows, len(up)), down.shape[1])

    def form_chunks() -> Iterator[torch.Tensor]:
        for rows in up.split(num_rows):
            yield torch.mm(rows, down, out=buffer[: len(rows)])

    return scan_chunks(form_chunks(), len(up) * down.shape[1], std, should_stop)


def scan_dense(
    delta: torch.Tensor, std: float, should_stop: Callable[[], bool] | None = None
) -> Entries:
    parts = delta.split(count_rows(delta.shape[1]))
    chunks = (rows.double().mul(TO_POWER_OF_TWO).float() for rows in parts)
    return scan_chunks(chunks, delta.numel(), std, should_stop)


def scan_kronecker(
    w1: torch.Tensor,
    w2: torch.Tensor,
    scale: float,
    std: float,
    should_stop: Callable[[], bool] | None = None,
) -> Entries:
    """Scans scale * kron(w1, w2) without holding it: a file of kilobytes may expand to gigabytes.

    Gives the same statistics as `scan_dense` of the whole: every entry is one product.
    """
    columns = w1.shape[1] * w2.shape[1]

    def form_chunks() -> Iterator[torch.Tensor]:
        for row in w1.split(1):
            for rows in w2.split(count_rows(columns)):
                yield kronecker(row, rows, scale).double().mul(TO_POWER_OF_TWO).float()

    return scan_chunks(form_chunks(), len(w1) * len(w2) * columns, std, should_stop)


def count_rows(columns: int) -> int:
    return max(1, CHUNK_ENTRIES // columns)


def scan_chunks(
    chunks: Iterator[torch.Tensor],
    count: int,
    std: float,
    should_stop: Callable[[], bool] | None,
) -> Entries:
    """Chunks are float32, already multiplied by TO_POWER_OF_TWO, and are overwritten."""
    largest = 0.0
    codes = torch.zeros(NUM_CODES, dtype=torch.int64)
    sizes: list[torch.Tensor] = []
    for chunk in chunks:
        if should_stop is not None and should_stop():
            raise InterruptedError("the scan was stopped")
        magnitudes = chunk.abs_()
        largest = max(largest, magnitudes.max().item())
        if count <= MAX_SORTED:
            sizes.append(magnitudes.flatten().clone())
        bits = magnitudes.view(torch.int32).bitwise_right_shift_(16)
        codes += torch.bincount(bits.flatten(), minlength=NUM_CODES)
    if sizes:
        quantiles = sort_quantiles(torch.cat(sizes))
    else:
        quantiles = interpolate_quantiles(codes, largest / TO_POWER_OF_TWO)
    return summarise(codes, largest / TO_POWER_OF_TWO, std, quantiles)


def sort_quantiles(sizes: torch.Tensor) -> dict[float, float]:
    values = sizes.double().div_(TO_POWER_OF_TWO).numpy()
    return dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))


def interpolate_quantiles(codes: torch.Tensor, largest: float) -> dict[float, float]:
    """As if the entries of a bin were evenly spaced."""
    edges, below = compute_edges(), codes.cumsum(0)
    quantiles = {}
    for quantile in QUANTILES:
        position = quantile * (int(below[-1]) - 1)
        index = int(torch.searchsorted(below, position, right=True))
        before = int(below[index - 1]) if index else 0
        share = (position - before + 0.5) / int(codes[index])
        value = edges[index] + share * (edges[index + 1] - edges[index])
        quantiles[quantile] = min(value.item(), largest)
    return quantiles


def summarise(
    codes: torch.Tensor, largest: float, std: float, quantiles: dict[float, float]
) -> Entries:
    edges = compute_edges()
    count = int(codes.sum())
    below = codes.cumsum(0)
    found = codes.nonzero().flatten()

    def share_below(value: float) -> float:
        index = int(torch.searchsorted(edges, value, right=True)) - 1
        inside = (value - edges[index]) / (edges[index + 1] - edges[index])
        full = int(below[index - 1]) if index > 0 else 0
        return (full + float(inside) * int(codes[index])) / count

    quarter = found // 32
    histogram = tuple(
        (edges[int(q) * 32].item(), int(codes[int(q) * 32 : int(q) * 32 + 32].sum()))
        for q in quarter.unique()
    )
    index = int(torch.searchsorted(edges, THRESHOLD * (1 - 1e-9)))
    below_threshold = int(below[index - 1]) if index else 0
    return Entries(count, largest, below_threshold / count, share_below(std), quantiles, histogram)


def compute_edges() -> torch.Tensor:
    """Lower edge of every code's bin in units of the delta, and one more; float64."""
    codes = torch.arange(NUM_CODES + 1, dtype=torch.int32)
    codes = codes.clamp_max(0x7F80)  # what follows is Inf and NaN
    values = torch.bitwise_left_shift(codes, 16).view(torch.float32).double()
    values[0x7F80:] = 2.0**128
    return values / TO_POWER_OF_TWO
