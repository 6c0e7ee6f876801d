"""How much of a small delta is left when it is merged into weights of few bits.

The stored values form a grid. Adding a delta moves a weight off it, and storing it moves it
back: to the nearest point (bf16, fp16), or to one of its two neighbours by chance (fp8, int8). The
result is the error this makes, relative to the delta: |round(W + delta) - (W + delta)|_F /
|delta|_F.

ComfyUI 0.30 rounds merges so (comfy/model_patcher.py, patch_weight_to_device): weights without a
scale by comfy/float.py, which is by chance for fp8 alone; those with one by the layout's own
`quantize` with a seed, by chance for all of them, and **with the scale recomputed** from the
sum's largest value. A new scale moves the whole grid, so that even weights whose delta is 0 are
rounded again. What follows repeats that: see `compute_merged_scale` and `Grid`.

Not repeated: on most GPUs ComfyUI adds in fp16. Measured, that changes the results by less than a
tenth, except for scaled e5m2, whose scale is then kept above 1 / 65504: there a merge is worse than
predicted here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..adapter.delta import upcast
from ..algebra.factors import Factors
from ..base_model.base_weight import MX_BLOCK, BaseWeight, rotate

#: Rows that a prediction samples, spread over the whole weight: 200,000 weights of the real model.
PREDICTED_ROWS = 64
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Grid:
    """The values of a storage format, and how one of them is chosen."""

    mantissa_bits: int
    min_exponent: int
    """Below 2^min_exponent the spacing stays the same (subnormal numbers; all of int8)."""
    max_value: float
    is_stochastic: bool
    is_halved: bool = False
    """Goes through fp16 and a chance of 8 bits first (comfy_kitchen, stochastic_rounding_fp8)."""

    def compute_spacing(self, values: torch.Tensor) -> torch.Tensor:
        """Distance to the next number, for each of `values`."""
        exponents = values.abs().clamp_min(1e-38).log2().floor().clamp_min(self.min_exponent)
        return torch.exp2(exponents - self.mantissa_bits)

    def find_neighbours(
        self, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each value the one below, the one above, and the probability of rounding up."""
        seen = values.half().to(values) if self.is_halved else values
        spacing = self.compute_spacing(seen)
        steps = seen / spacing
        low = steps.floor()
        chance = steps - low
        if not self.is_stochastic:
            chance = chance.round()
        elif self.is_halved:
            chance = (chance * 256).floor() / 256
        limit = self.max_value
        return (
            (low * spacing).clamp(-limit, limit),
            ((low + 1) * spacing).clamp(-limit, limit),
            chance,
        )


GRIDS = {
    torch.bfloat16: Grid(7, -126, torch.finfo(torch.bfloat16).max, is_stochastic=False),
    torch.float16: Grid(10, -14, 65504.0, is_stochastic=False),
    torch.float8_e4m3fn: Grid(3, -6, 448.0, is_stochastic=True, is_halved=True),
    torch.float8_e5m2: Grid(2, -14, 57344.0, is_stochastic=True, is_halved=True),
    torch.int8: Grid(7, 7, 127.0, is_stochastic=True),
}
#: Of weights that are packed; what is not listed goes through a table or two scales when merged.
PACKED_GRIDS = {"int4": Grid(3, 3, 7.0, is_stochastic=True)}


def find_grid(weight: BaseWeight) -> Grid | None:
    """The grid of a weight's storage; None where it is exact enough, or unknown."""
    return PACKED_GRIDS.get(weight.packed) if weight.packed else GRIDS.get(weight.stored.dtype)


def predict_error(weight: BaseWeight, delta_std: float, peak: float | None = None) -> float | None:
    """The relative error to expect of a normally distributed delta of this size.

    Args:
        peak: what `find_peak` gave for the delta itself; without it one is drawn.

    Returns:
        None where the format is exact enough to need no answer (float32), or unknown.
    """
    grid = find_grid(weight)
    if grid is None or delta_std == 0:
        return None
    part = weight.take_rows(choose_rows(weight.stored.shape[0], PREDICTED_ROWS))
    values = part.values.double()
    generator = torch.Generator().manual_seed(0)
    tuned = values + torch.randn(values.shape, generator=generator).double() * delta_std
    codes, scale = encode(part, tuned, peak)
    low, high, chance = grid.find_neighbours(codes)
    squares = torch.lerp((low - codes).square(), (high - codes).square(), chance)
    return ((squares * scale**2).mean().sqrt() / delta_std).item()


def measure_error(
    weight: BaseWeight, delta: torch.Tensor, peak: float | None = None, seed: int = 0
) -> float | None:
    """The relative error by actual rounding: `weight` and `delta` (rows, in) of the same rows.

    Args:
        peak: what `find_peak` gave for the whole weight; without it these rows are the whole.
    """
    grid = find_grid(weight)
    norm = delta.double().norm().item()
    if grid is None or norm == 0:
        return None
    codes, scale = encode(weight, weight.values.double() + delta.double(), peak)
    if grid.is_stochastic:
        low, high, chance = grid.find_neighbours(codes)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(codes.shape, generator=generator, dtype=torch.float64)
        rounded = torch.where(drawn < chance, high, low)
    else:
        rounded = codes.to(weight.stored.dtype).double()
    return ((rounded - codes) * scale).norm().item() / norm


def encode(
    weight: BaseWeight, tuned: torch.Tensor, peak: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum in units of the codes it will be stored as, not rounded yet, and that unit."""
    tuned = rotate(tuned, weight.rotation)
    scale = compute_merged_scale(weight, tuned, peak)
    return tuned / scale, scale


def compute_merged_scale(
    weight: BaseWeight, tuned: torch.Tensor, peak: float | None
) -> torch.Tensor:
    """The scale that ComfyUI stores a sum with; 1 where there is none.

    int8 keeps one per row if it had a scale with a dimension at all, even a single one
    (comfy_kitchen/tensor/int8.py, requantize_kwargs); fp8 always gets one (comfy/quant_ops.py).
    """
    if weight.scaling == "none":
        return tuned.new_ones(())
    grid = find_grid(weight)
    assert grid is not None  # the callers have it
    limit = grid.max_value
    if weight.scaling == "block":
        peaks = tuned.abs().unflatten(1, (-1, MX_BLOCK)).amax(2)
        exponents = (peaks / limit).clamp_min(2.0**-127).log2().ceil()
        return torch.exp2(exponents).repeat_interleave(MX_BLOCK, dim=1)
    if has_scale_per_row(weight):
        return tuned.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
    largest = tuned.abs().max() if peak is None else tuned.new_tensor(peak)
    return largest.clamp_min(1e-30) / limit


def has_scale_per_row(weight: BaseWeight) -> bool:
    """Whether the merged weight will have one."""
    has_dimension = isinstance(weight.scale, torch.Tensor) and weight.scale.ndim > 0
    return weight.stored.dtype == torch.int8 and bool(weight.rotation or has_dimension)


def find_peak(
    weight: BaseWeight, values: torch.Tensor, delta: Factors | torch.Tensor
) -> float | None:
    """|W + delta| at its largest, where one scale for the whole weight depends on it.

    Args:
        values: those of `weight`, float32 (out, in).
    """
    if weight.scaling in ("none", "block") or has_scale_per_row(weight):
        return None
    largest = 0.0
    for start in range(0, len(values), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        if isinstance(delta, Factors):
            tuned = torch.addmm(values[rows], delta.up[rows].float(), delta.down.float())
        else:
            tuned = values[rows] + upcast(delta[rows])
        largest = max(largest, tuned.abs().max().item())
    return largest


def choose_rows(count: int, limit: int) -> torch.Tensor:
    """Up to `limit` row numbers, spread evenly."""
    return torch.arange(0, count, max(1, -(-count // limit)))
