"""Adapters as factor pairs: delta = up @ down, without ever forming the product.

Legend: down (r, in), up (out, r), both float64 with the scale folded into `up`; r is the inner
dimension. Everything here costs O((out + in) r^2), the product would cost O(out * in * r).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch

from ..adapter.weights import LohaWeights, LokrWeights, LoraWeights, ModuleWeights

#: A LoHa of rank r is a product of inner dimension r^2; beyond this share of the smaller side the
#: dense matrix is cheaper.
MAX_KHATRI_RAO = 1 / 3


@dataclass(frozen=True)
class Factors:
    """delta = up @ down in float64."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def inner(self) -> int:
        return self.down.shape[0]

    @cached_property
    def gram_up(self) -> torch.Tensor:
        """up^T up, (r, r)."""
        return self.up.T @ self.up

    @cached_property
    def gram_down(self) -> torch.Tensor:
        """down down^T, (r, r)."""
        return self.down @ self.down.T

    def __add__(self, other: Factors) -> Factors:
        """The factors of the sum, by concatenation."""
        down = torch.cat([self.down, other.down])
        return Factors(down, torch.cat([self.up, other.up], dim=1))

    def __mul__(self, strength: float) -> Factors:
        return Factors(self.down, self.up * strength)

    def to_dense(self) -> torch.Tensor:
        return self.up @ self.down


@overload
def get_factors(weights: LoraWeights) -> Factors: ...
@overload
def get_factors(weights: ModuleWeights) -> Factors | None: ...
def get_factors(weights: ModuleWeights) -> Factors | None:
    """The factors of additive weights; None for kinds that have none cheaper than the matrix."""
    if isinstance(weights, LoraWeights):
        return reduce_inner(
            Factors(weights.lora_A.double(), weights.lora_B.double() * weights.scale)
        )
    if isinstance(weights, LohaWeights):
        return multiply_hadamard(weights)
    if isinstance(weights, LokrWeights):
        return multiply_kronecker(weights)
    return None


def reduce_inner(factors: Factors) -> Factors:
    """The same delta with an inner dimension of at most its smaller side."""
    rows, columns = factors.shape
    if factors.inner <= min(rows, columns):
        return factors
    dense = factors.to_dense()
    if rows <= columns:
        return Factors(dense, torch.eye(rows, dtype=dense.dtype))
    return Factors(torch.eye(columns, dtype=dense.dtype), dense)


def multiply_hadamard(weights: LohaWeights) -> Factors | None:
    """(P Q) * (R S) = khatri_rao(P, R) @ khatri_rao(Q, S): every pair of ranks is one rank."""
    rows, columns = weights.shape
    if weights.rank**2 > MAX_KHATRI_RAO * min(rows, columns):
        return None
    w1_a, w1_b, w2_a, w2_b = (weights.need_part(name).double() for name in weights.NAMES)
    up = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(rows, -1)
    down = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, columns)
    return Factors(down, up * weights.scale)


def multiply_kronecker(weights: LokrWeights) -> Factors | None:
    """kron(w1, C D) = kron(w1, C) @ kron(I, D), where w2 is stored as a product of small rank."""
    if "lokr_w2_a" not in weights.parts:
        return None
    w1 = weights.factor("lokr_w1").double()
    w2_a, w2_b = (weights.need_part(name).double() for name in ("lokr_w2_a", "lokr_w2_b"))
    rows, columns = weights.shape
    if min(w1.shape) * w2_a.shape[1] > MAX_KHATRI_RAO * min(rows, columns):
        return None
    if w1.shape[0] <= w1.shape[1]:  # the smaller side carries the inner dimension
        identity = torch.eye(w1.shape[0], dtype=torch.float64)
        return Factors(torch.kron(w1, w2_b), torch.kron(identity, w2_a) * weights.scale)
    identity = torch.eye(w1.shape[1], dtype=torch.float64)
    return Factors(torch.kron(identity, w2_b), torch.kron(w1, w2_a) * weights.scale)


def compute_inner_product(a: Factors, b: Factors) -> float:
    """<delta_a, delta_b> = sum((up_a^T up_b) * (down_a down_b^T)); inner dimensions may differ."""
    return ((a.up.T @ b.up) * (a.down @ b.down.T)).sum().item()


def compute_core(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """QR of both factors: delta = Q_up @ core @ Q_down^T with orthonormal Q_up, Q_down.

    Returns:
        Q_up (out, k), core (k, l), Q_down (in, l) with k = min(out, r), l = min(in, r).
    """
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.T)
    return q_up, r_up @ r_down.T, q_down


#: Bound on the relative error of the smallest singular value's square under which Gram matrices
#: replace QR; they are 4 to 5 times cheaper.
GRAM_TOLERANCE = 1e-8


@dataclass(frozen=True)
class GramSplit:
    """up^T up = root root^T, so delta = Q root^T down with orthonormal Q.

    So the squares of delta's singular values are the eigenvalues of `core`. Rounding in them is
    relative to `bound`: Gram matrices square the condition number.
    """

    eigenvalues: torch.Tensor
    vectors: torch.Tensor
    root: torch.Tensor
    core: torch.Tensor
    """root^T down down^T root"""
    bound: float
    """(|up| |down|)^2"""

    def is_exact(self, smallest: float, bound: float | None = None) -> bool:
        """Whether `GRAM_TOLERANCE` holds for a square of this size; False for 0 and for rounding.

        Args:
            bound: what rounding in it is relative to, if not `self.bound`.
        """
        bound = self.bound if bound is None else bound
        return torch.finfo(torch.float64).eps * bound < GRAM_TOLERANCE * smallest


def split_gram(factors: Factors) -> GramSplit:
    eigenvalues, vectors = torch.linalg.eigh(factors.gram_up)
    root = vectors * eigenvalues.clamp_min(0).sqrt()
    core = root.T @ factors.gram_down @ root
    bound = (factors.gram_up.trace() * factors.gram_down.trace()).clamp_min(0).item()
    return GramSplit(eigenvalues, vectors, root, core, bound)


def compute_singular_values(factors: Factors) -> torch.Tensor:
    """All singular values of the delta, descending, min(r, out, in) of them.

    By Gram matrices where they are exact enough for the smallest, else by QR.
    """
    count = min(factors.inner, *factors.shape)
    gram = split_gram(factors)
    squares = torch.linalg.eigvalsh(gram.core).clamp_min(0).flip(0)[:count]
    if gram.is_exact(squares.min().item()):
        return squares.sqrt()
    return torch.linalg.svdvals(compute_core(factors)[1])[:count]


def compute_effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values / total
    shares = shares[shares > 0]
    return torch.exp(-(shares * shares.log()).sum()).item()
