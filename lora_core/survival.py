"""How much of a small delta is left when it is merged into weights of few bits.

The stored values lie on a grid whose spacing grows with their size. Adding a delta moves a weight
off the grid, and storing it moves it back: to the nearest point (bf16, fp16), or to one of the two
neighbours by chance (fp8, as ComfyUI merges: comfy/float.py). The figure is the error this makes,
relative to the delta: |round(W + delta) - (W + delta)|_F / |delta|_F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base_weights import BaseWeight


@dataclass(frozen=True)
class Grid:
    """The floating-point numbers of a storage format."""

    mantissa_bits: int
    min_exponent: int
    """Below 2^min_exponent the spacing stays the same (subnormal numbers)."""
    is_stochastic: bool

    def compute_spacing(self, values: torch.Tensor) -> torch.Tensor:
        """Distance to the next number, for each of `values`."""
        exponents = values.abs().clamp_min(1e-38).log2().floor().clamp_min(self.min_exponent)
        return torch.exp2(exponents - self.mantissa_bits)


GRIDS = {
    torch.bfloat16: Grid(7, -126, is_stochastic=False),
    torch.float16: Grid(10, -14, is_stochastic=False),
    torch.float8_e4m3fn: Grid(3, -6, is_stochastic=True),
    torch.float8_e5m2: Grid(2, -14, is_stochastic=True),
}

#: Points of the quadrature over a normal distribution, in units of its std.
_POINTS = torch.linspace(-6, 6, 4001, dtype=torch.float64)
_DENSITY = torch.exp(-_POINTS.square() / 2)
_DENSITY /= _DENSITY.sum()


def predict_error(weight: BaseWeight, delta_std: float) -> float | None:
    """The relative error for a normally distributed delta, from the spacing at every weight.

    None where the format is exact enough to need no answer (float32), or unknown.
    """
    grid = GRIDS.get(weight.stored.dtype)
    if grid is None or delta_std == 0:
        return None
    spacings = grid.compute_spacing(weight.stored.float()) * (weight.scale or 1.0)
    values, counts = spacings.unique(return_counts=True)
    squares = [expect_square(grid, spacing, delta_std) for spacing in values.double().tolist()]
    mean = (torch.tensor(squares) * counts).sum() / counts.sum()
    return (mean.sqrt() / delta_std).item()


def expect_square(grid: Grid, spacing: float, std: float) -> float:
    """Mean squared rounding error of W + delta, with W on the grid and delta normal."""
    if std > 50 * spacing:  # then the delta's remainder is uniform, and no quadrature resolves it
        return spacing**2 / (6 if grid.is_stochastic else 12)
    deltas = _POINTS * std
    if grid.is_stochastic:
        rest = deltas.abs().remainder(spacing)
        squares = rest * (spacing - rest)  # variance of a coin between the two neighbours
    else:
        squares = (deltas - spacing * (deltas / spacing).round()).square()
    return (squares * _DENSITY).sum().item()


def measure_error(weight: BaseWeight, delta: torch.Tensor, seed: int = 0) -> float | None:
    """The relative error by rounding for real: `weight` and `delta` (rows, in) of the same rows."""
    grid = GRIDS.get(weight.stored.dtype)
    norm = delta.double().norm().item()
    if grid is None or norm == 0:
        return None
    scale = weight.scale or 1.0
    tuned = (weight.values.double() + delta.double()) / scale
    if grid.is_stochastic:
        spacing = grid.compute_spacing(tuned)
        steps = tuned / spacing
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(tuned.shape, generator=generator, dtype=torch.float64)
        rounded = ((steps.floor() + (chance < steps - steps.floor())) * spacing).clamp(
            *(torch.finfo(weight.stored.dtype).min, torch.finfo(weight.stored.dtype).max)
        )
    else:
        rounded = tuned.to(weight.stored.dtype).double()
    return ((rounded - tuned).norm().item() * scale) / norm
