"""The best low-rank version of one module's delta, and what it leaves out.

Every result is a balanced pair of scale 1: the square root of a singular value on either side.
Energies are squared Frobenius norms; what is left out is measured on the tensors as stored.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adapter.adapter import is_finite
from ..adapter.delta import upcast
from ..adapter.weights import LokrWeights, LoraWeights, ModuleWeights
from ..disk.safetensors_file import AnyTensor
from .factors import Factors, compute_core, compute_inner_product, get_factors
from .products import CHUNK_ROWS, build_products, compute_square, measure_difference

#: Columns beyond the wanted rank, and power iterations, of the randomised SVD.
OVERSAMPLING = 16
POWER_ITERATIONS = 2
#: Share of the smaller side above which a randomised SVD is no faster than an exact one.
MAX_RANDOMISED = 1 / 4
#: Share of the energy that float64 cannot distinguish from 0.
ROUNDING = 1e-15


@dataclass(frozen=True)
class Truncated:
    """A module's new weights, the energy of the original, and the energy lost."""

    weights: ModuleWeights
    energy: float
    residual: float = 0.0

    @property
    def retained(self) -> float:
        return 1.0 - self.residual / self.energy if self.energy else 1.0


def truncate_weights(weights: ModuleWeights, rank: int | None, energy: float | None) -> Truncated:
    """An additive module's delta at a lower rank; a LoRA whose rank suffices stays unchanged."""
    factors = get_factors(weights)
    bias, dtype = weights.parts.get("bias_delta"), choose_dtype(weights)
    if factors is not None:
        truncated = truncate_factors(factors, rank, energy, dtype, bias)
        if isinstance(weights, LoraWeights) and truncated.weights.rank >= weights.rank:
            return Truncated(weights, truncated.energy)
        return truncated
    if isinstance(weights, LokrWeights):
        return truncate_kronecker(weights, rank, energy, dtype, bias)
    return truncate_dense(weights.delta(), rank, energy, dtype, bias)


def truncate_factors(
    factors: Factors,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    bias_delta: AnyTensor | None = None,
) -> Truncated:
    """The best approximation (Eckart and Young 1936), by the SVD of the small core."""
    q_up, core, q_down = compute_core(factors)
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    kept = choose_rank(values, rank, energy)
    weights = build_lora_weights(
        q_up @ u[:, :kept], values[:kept], vh[:kept] @ q_down.T, dtype, bias_delta
    )
    return Truncated(weights, values.square().sum().item(), measure_loss(factors, weights))


def truncate_kronecker(
    weights: LokrWeights,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    bias_delta: AnyTensor | None,
) -> Truncated:
    """The SVD of kron(w1, w2) is made of the pairs of singular vectors of w1 and w2."""
    w1, w2 = weights.factor("lokr_w1").double(), weights.factor("lokr_w2").double()
    u1, s1, vh1 = torch.linalg.svd(w1 * weights.scale, full_matrices=False)
    u2, s2, vh2 = torch.linalg.svd(w2, full_matrices=False)
    values, order = torch.outer(s1, s2).reshape(-1).sort(descending=True)
    kept = choose_rank(values, rank, energy)
    first, second = order[:kept] // len(s2), order[:kept] % len(s2)
    up = (u1[:, None, first] * u2[None, :, second]).reshape(-1, kept)
    down = (vh1[first, :, None] * vh2[second, None, :]).reshape(kept, -1)
    result = build_lora_weights(up, values[:kept], down, dtype, bias_delta)
    square = compute_square(weights)
    found = get_factors(result)
    # <kron(w1, w2), up_k down_k> for all k together
    inner = torch.einsum(
        "pmk,pq,mn,kqn->",
        found.up.reshape(len(w1), len(w2), kept),
        w1 * weights.scale,
        w2,
        found.down.reshape(kept, w1.shape[1], w2.shape[1]),
    ).item()
    residual = max(square + compute_inner_product(found, found) - 2 * inner, 0.0)
    return Truncated(result, square, residual)


def truncate_dense(
    delta: torch.Tensor,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    bias_delta: AnyTensor | None = None,
) -> Truncated:
    """By the SVD of the whole matrix; see `compute_leading_svd`."""
    delta = upcast(delta)
    u, values, vh = compute_leading_svd(delta, rank if energy is None else None)
    kept = choose_rank(values, rank, energy)
    weights = build_lora_weights(u[:, :kept], values[:kept], vh[:kept], dtype, bias_delta)
    return Truncated(weights, sum_squares(delta), measure_dense_loss(delta, weights))


def compute_leading_svd(
    matrix: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, singular values and V^T, at least the first `rank` of each (None: all).

    Randomised where the rank is small, which is many times faster, else exact.
    """
    if rank is not None and rank + OVERSAMPLING <= MAX_RANDOMISED * min(matrix.shape):
        return compute_randomised_svd(matrix, rank)
    return torch.linalg.svd(matrix, full_matrices=False)


def compute_randomised_svd(
    matrix: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.

    As torch.svd_lowrank, but with its own generator: the same matrix gives the same result, and the
    global random state does not change.
    """
    size = f"{tuple(matrix.shape)} {rank}".encode()
    generator = torch.Generator().manual_seed(zlib.crc32(size))
    shape = (matrix.shape[1], rank + OVERSAMPLING)
    q = torch.linalg.qr(matrix @ torch.randn(shape, generator=generator).to(matrix))[0]
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q)[0])[0]
    u, values, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, values, vh


def choose_rank(values: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """The smallest rank that holds `energy`, never above `rank` nor below 1."""
    limit = len(values) if rank is None else min(rank, len(values))
    if energy is None:
        return limit
    squares = values.double().square()
    left_out = squares.flip(0).cumsum(0).flip(0)  # by every rank from 0 on
    allowed = (1.0 - energy + ROUNDING) * left_out[0]
    return max(1, min(limit, int((left_out > allowed).sum())))


def choose_dtype(*weights: ModuleWeights) -> torch.dtype:
    """The widest the tensors are stored in, widened itself; see `widen_dtype`."""
    dtypes = [widen_dtype(tensor.dtype) for one in weights for tensor in one.parts.values()]
    return functools.reduce(torch.promote_types, dtypes)


def widen_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a result: float32 where integers or booleans came in, bf16 where 8-bit floats did."""
    if not dtype.is_floating_point:
        return torch.float32
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def round_all(values: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """All in `dtype`, or in float32 where that overflows in one of them."""
    rounded = [tensor.to(dtype) for tensor in values]
    if all(is_finite(tensor) for tensor in rounded):
        return rounded
    return [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in values]


def build_lora_weights(
    u: torch.Tensor,
    values: torch.Tensor,
    vh: torch.Tensor,
    dtype: torch.dtype,
    bias_delta: AnyTensor | None,
) -> LoraWeights:
    root = values.sqrt()
    lora_A, lora_B = round_all([root[:, None] * vh, u * root], dtype)
    return LoraWeights(lora_A.contiguous(), lora_B.contiguous(), float(len(root)), bias_delta)


def measure_loss(exact: Factors, stored: LoraWeights) -> float:
    """|exact - stored|^2 from the factors."""
    found = get_factors(stored)
    squares = compute_inner_product(exact, exact), compute_inner_product(found, found)
    inner = compute_inner_product(exact, found)
    return build_products(
        *squares, inner, lambda: measure_difference(exact, found)
    ).square_difference


def measure_dense_loss(delta: torch.Tensor, stored: LoraWeights) -> float:
    """|delta - stored|^2, a few rows at a time."""
    factors, total = get_factors(stored), 0.0
    up, down = factors.up.to(delta), factors.down.to(delta)
    for rows, up_rows in zip(delta.split(CHUNK_ROWS), up.split(CHUNK_ROWS), strict=True):
        total += sum_squares(rows - up_rows @ down)
    return total


def sum_squares(matrix: torch.Tensor) -> float:
    """Rows in the matrix's own dtype, their sum in float64; NaN or Inf if any entry is."""
    return torch.linalg.vector_norm(matrix, dim=1).double().square().sum().item()
