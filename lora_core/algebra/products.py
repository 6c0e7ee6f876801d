"""Inner products of two modules' deltas, each kind by its shortest exact route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..adapter.weights import LokrWeights, ModuleWeights
from ..messages import message
from .factors import Factors, compute_core, compute_inner_product, get_factors

#: Below this share of |a|^2 + |b|^2, |b - a|^2 has lost digits as a difference of products and is
#: computed from b - a itself.
CANCELLATION = 1e-4
#: Rows of a dense delta that are converted to float64 at a time.
CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Products:
    """|a|^2, |b|^2, <a, b> and |b - a|^2 of two deltas, or sums of them over modules."""

    square_a: float = 0.0
    square_b: float = 0.0
    inner: float = 0.0
    square_difference: float = 0.0

    def __add__(self, other: Products) -> Products:
        """Those of the concatenated deltas."""
        return Products(
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.inner + other.inner,
            self.square_difference + other.square_difference,
        )


def explain_no_delta(weights: ModuleWeights) -> str | None:
    """Why these weights have no delta of their own; None where they have."""
    if not weights.is_additive:
        return message(
            "the delta of {weights_kind} weights depends on the base weight",
            weights_kind=weights.kind,
        )
    if weights.shape is None:
        return message("it holds a bias only")
    return None


def compute_square(weights: ModuleWeights) -> float:
    """Squared Frobenius norm of an additive delta."""
    factors = get_factors(weights)
    if factors is not None:
        return compute_inner_product(factors, factors)
    if isinstance(weights, LokrWeights):
        return compute_kronecker_products(weights, weights).square_a
    delta = weights.delta()
    return compute_dense_products(delta, delta).square_a


def compute_products(a: ModuleWeights, b: ModuleWeights) -> Products:
    """For additive weights of one shape that do not both have factors."""
    if isinstance(a, LokrWeights) and isinstance(b, LokrWeights):
        if a.factor("lokr_w1").shape == b.factor("lokr_w1").shape:
            return compute_kronecker_products(a, b)
    return compute_dense_products(a.delta(), b.delta())


def build_products(
    square_a: float, square_b: float, inner: float, measure_difference: Callable[[], float]
) -> Products:
    """Adds |b - a|^2, measured on the difference where the other three lack the precision."""
    difference = square_a + square_b - 2 * inner
    if difference < CANCELLATION * (square_a + square_b):
        difference = measure_difference()
    return Products(square_a, square_b, inner, difference)


def measure_difference(a: Factors, b: Factors) -> float:
    """|b - a|^2 from the core of the two stacked; exact where the products cancel."""
    return compute_core(b + a * -1)[1].square().sum().item()


def compute_kronecker_products(a: LokrWeights, b: LokrWeights) -> Products:
    """<kron(A, B), kron(C, D)> = <A, C> <B, D>, where A and C have one shape."""
    a1, b1 = a.factor("lokr_w1").double() * a.scale, b.factor("lokr_w1").double() * b.scale
    a2, b2 = a.factor("lokr_w2").double(), b.factor("lokr_w2").double()

    def measure() -> float:
        # kron(C, D) - kron(A, B) = kron(C - A, D) + kron(A, D - B)
        d1, d2 = b1 - a1, b2 - a2
        mixed = dot(d1, a1) * dot(b2, d2)
        return dot(d1, d1) * dot(b2, b2) + dot(a1, a1) * dot(d2, d2) + 2 * mixed

    squares = dot(a1, a1) * dot(a2, a2), dot(b1, b1) * dot(b2, b2)
    return build_products(*squares, dot(a1, b1) * dot(a2, b2), measure)


def compute_dense_products(a: torch.Tensor, b: torch.Tensor) -> Products:
    """Sums in float64 of deltas in float32, a few rows at a time."""
    total = Products()
    for a_rows, b_rows in zip(a.split(CHUNK_ROWS), b.split(CHUNK_ROWS), strict=True):
        a64, b64 = a_rows.double(), b_rows.double()
        d64 = b64 - a64
        total += Products(dot(a64, a64), dot(b64, b64), dot(a64, b64), dot(d64, d64))
    return total


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()
