"""Statistics of a delta from its factors or, where it has none, from the matrix itself. float64.

All but the spectrum are polynomials of degree two in the entries, so the factors suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..adapter.weights import LokrWeights
from ..algebra.factors import Factors, compute_singular_values


@dataclass(frozen=True)
class Measures:
    """Statistics of one delta; std is that of the population."""

    mean: float
    std: float
    frobenius: float
    singular_values: torch.Tensor
    """Descending, float64; as many as the delta's rank may have."""
    row_norms: torch.Tensor
    """(out,): the norm of what each output gains."""
    column_norms: torch.Tensor
    """(in,)"""


def measure_factors(factors: Factors) -> Measures:
    rows, columns = factors.shape
    gram_down, gram_up = factors.gram_down, factors.gram_up
    row_squares = ((factors.up @ gram_down) * factors.up).sum(1).clamp_min(0)
    column_squares = ((gram_up @ factors.down) * factors.down).sum(0).clamp_min(0)
    total = (factors.up.sum(0) @ factors.down.sum(1)).item()
    squares = (gram_up * gram_down).sum().clamp_min(0).item()
    return build_measures(
        total,
        squares,
        rows * columns,
        compute_singular_values(factors),
        row_squares,
        column_squares,
    )


def measure_dense(delta: torch.Tensor) -> Measures:
    """For kinds that have no factors, and for deltas that depend on the base weight."""
    delta = delta.double()
    squares = delta.square()
    return build_measures(
        delta.sum().item(),
        squares.sum().item(),
        delta.numel(),
        torch.linalg.svdvals(delta),
        squares.sum(1),
        squares.sum(0),
    )


def measure_kronecker(weights: LokrWeights) -> Measures:
    """kron(w1, w2): sums and norms multiply, the spectrum is every product of singular values."""
    w1 = weights.factor("lokr_w1").double() * weights.scale
    w2 = weights.factor("lokr_w2").double()
    first, second = measure_dense(w1), measure_dense(w2)
    spectrum = torch.outer(first.singular_values, second.singular_values).flatten()
    rows, columns = weights.shape
    return build_measures(
        (w1.sum() * w2.sum()).item(),
        (w1.square().sum() * w2.square().sum()).item(),
        rows * columns,
        spectrum.sort(descending=True).values,
        torch.kron(first.row_norms.square(), second.row_norms.square()),
        torch.kron(first.column_norms.square(), second.column_norms.square()),
    )


def build_measures(
    total: float,
    squares: float,
    count: int,
    singular_values: torch.Tensor,
    row_squares: torch.Tensor,
    column_squares: torch.Tensor,
) -> Measures:
    mean = total / count
    return Measures(
        mean,
        max(squares / count - mean**2, 0.0) ** 0.5,
        squares**0.5,
        singular_values,
        row_squares.sqrt(),
        column_squares.sqrt(),
    )


def compute_stable_rank(singular_values: torch.Tensor) -> float:
    """|delta|_F^2 / sigma_1^2 (Rudelson and Vershynin 2007); 0 for a zero delta."""
    if singular_values.numel() == 0 or singular_values[0] == 0:
        return 0.0
    return (singular_values.square().sum() / singular_values[0].square()).item()


def compute_energy_rank(singular_values: torch.Tensor, energy: float) -> int:
    """The fewest singular values that hold this share of the squared Frobenius norm."""
    squares = singular_values.square().cumsum(0)
    if squares.numel() == 0 or squares[-1] == 0:
        return 0
    # A hair below, so that rounding in the last value cannot ask for one more than there is.
    return int((squares < (energy - 1e-12) * squares[-1]).sum().item()) + 1
