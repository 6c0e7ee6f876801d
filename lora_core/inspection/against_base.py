"""A delta compared with the weight it is added to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..algebra.factors import Factors
from ..base_model.base_weight import BaseWeight
from ..errors import NonFiniteWeightsError
from .survival import choose_rows, find_peak, measure_error, predict_error

SAMPLED_ROWS = 256
POWER_STEPS = 24


@dataclass(frozen=True)
class BaseStatistics:
    """How a delta compares with its base weight W."""

    storage: str
    """E.g. "float8_e4m3fn"."""
    frobenius: float
    """|W|_F"""
    ratio: float
    """|delta|_F / |W|_F"""
    spectral: float
    """sigma_1(W), from below, by power iteration to about 1 %."""
    spectral_ratio: float
    """sigma_1(delta) / sigma_1(W)"""
    cosine: float
    """<W, delta> / (|W| |delta|): whether the delta scales W up."""
    alignment: float
    """|u^T delta v| / sigma_1(delta) for W's first singular vectors u, v."""
    merge_error_predicted: float | None
    """Relative error of the delta if merged into this storage; None where it does not matter."""
    merge_error_measured: float | None
    """The same, measured by rounding some rows; None where it was not sampled."""

    def compute_norm(self, strength: float) -> float:
        """|W + strength * delta|_F, for any strength, from three inner products."""
        delta = self.ratio * self.frobenius
        inner = self.cosine * delta * self.frobenius
        return (self.frobenius**2 + 2 * strength * inner + (strength * delta) ** 2) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_with_base(
    weight: BaseWeight,
    delta: Factors | torch.Tensor,
    delta_norm: float,
    delta_spectral: float,
    *,
    is_sampled: bool,
) -> BaseStatistics:
    """Statistics of a delta, given as factors or as a matrix, relative to its base weight.

    Args:
        is_sampled: also measure rounding on some rows.

    Raises:
        NonFiniteWeightsError: the base weight holds NaN or Inf.
    """
    values = weight.values
    norm = values.norm(dtype=torch.float64).item()
    if not math.isfinite(norm):
        raise NonFiniteWeightsError("the base's weight holds NaN or Inf")
    if isinstance(delta, Factors):
        # <W, up down> = sum(up * (W down^T)): W is read once, the product never formed.
        inner = (delta.up * (values @ delta.down.T.float()).double()).sum().item()
    else:
        inner = (delta.double() * values.double()).sum().item()
    u, spectral, v = find_top_direction(values)
    if isinstance(delta, Factors):
        along = ((u.double() @ delta.up) @ (delta.down @ v.double())).item()
    else:
        along = (u.double() @ delta.double() @ v.double()).item()
    std = delta_norm / values.numel() ** 0.5
    peak = find_peak(weight, values, delta)
    measured = None
    if is_sampled:
        rows = choose_rows(len(values), SAMPLED_ROWS)
        part = delta.up[rows] @ delta.down if isinstance(delta, Factors) else delta[rows]
        measured = measure_error(weight.take_rows(rows), part, peak)
    return BaseStatistics(
        storage=weight.storage,
        frobenius=norm,
        ratio=delta_norm / norm if norm else 0.0,
        spectral=spectral,
        spectral_ratio=delta_spectral / spectral if spectral else 0.0,
        cosine=inner / (norm * delta_norm) if norm and delta_norm else 0.0,
        alignment=abs(along) / delta_spectral if delta_spectral else 0.0,
        merge_error_predicted=predict_error(weight, std, peak),
        merge_error_measured=measured,
    )


def find_top_direction(values: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    """First singular triple (u, sigma, v) of a float32 matrix by power iteration."""
    v = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_STEPS):
        v = values.T @ (values @ v)
        length = v.norm()
        if length == 0:
            return values.new_zeros(values.shape[0]), 0.0, torch.zeros_like(v)
        v /= length
    u = values @ v
    sigma = u.norm().item()
    return u / sigma, sigma, v
