"""Singular subspaces of deltas, and how far those of two adapters coincide."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .factors import Factors, compute_core, split_gram

#: Singular values below this share of the largest do not count as directions.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Overlap:
    """How much of the smaller of two subspaces is contained in the larger: 0 none, 1 all.

    phi = |U_a^T U_b|_F^2 / min(i, j) (Hu et al. 2021, arXiv 2106.09685, section 7.2), for the
    spaces of the first i and j singular vectors.
    """

    rank_a: int
    rank_b: int
    left: float
    """Of the outputs that the deltas write to."""
    right: float
    """Of the inputs that the deltas read."""
    left_by_chance: float
    """What two random subspaces of these sizes share on average."""
    right_by_chance: float


@dataclass(frozen=True)
class FactoredSVD:
    """delta = U diag(values) V^T, with U = up @ left and V = down^T @ right never formed."""

    factors: Factors
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def project(self, other: FactoredSVD) -> tuple[torch.Tensor, torch.Tensor]:
        """U^T U_other and V^T V_other."""
        up = self.factors.up.T @ other.factors.up
        down = self.factors.down @ other.factors.down.T
        return self.left.T @ up @ other.left, self.right.T @ down @ other.right


def compute_svd(factors: Factors) -> FactoredSVD:
    """By Gram matrices where they are exact enough, else by QR; see `factors.GramSplit`."""
    gram = split_gram(factors)
    squares, turn = torch.linalg.eigh(gram.core)
    ends = gram.eigenvalues[0].item(), gram.eigenvalues[-1].item()
    is_exact = gram.is_exact(ends[0], bound=ends[1]) and gram.is_exact(squares[0].item())
    if factors.inner > min(factors.shape) or not is_exact:
        q_up, core, q_down = compute_core(factors)
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        return FactoredSVD(Factors(q_down.T, q_up), left, values, right.T)
    turn, values = turn.flip(1), squares.flip(0).sqrt()
    left = gram.vectors / gram.eigenvalues.sqrt() @ turn
    return FactoredSVD(factors, left, values, gram.root @ turn / values)


def count_directions(values: torch.Tensor, energy: float) -> int:
    """The fewest that hold this share of the energy, among those that are not rounding."""
    count = int((values > RANK_TOLERANCE * values[0]).sum())
    if energy == 1.0 or count == 0:
        return count
    held = values.square().cumsum(0)
    return min(count, int((held < energy * held[-1]).sum()) + 1)


def compute_overlap(
    left: torch.Tensor, right: torch.Tensor, i: int, j: int, shape: tuple[int, int]
) -> Overlap | None:
    if min(i, j) == 0:
        return None
    phi = [cross[:i, :j].square().sum().item() / min(i, j) for cross in (left, right)]
    # A random direction has the share j / n of its energy in a space of j of n dimensions.
    chance = [min(max(i, j) / size, 1.0) for size in shape]
    return Overlap(i, j, *(min(value, 1.0) for value in phi), *chance)


def average_overlaps(overlaps: list[Overlap]) -> Overlap | None:
    """The overlap of the direct sums: each module weighs as much as its smaller rank."""
    if not overlaps:
        return None
    weights = [min(overlap.rank_a, overlap.rank_b) for overlap in overlaps]

    def average(name: str) -> float:
        values = [getattr(overlap, name) for overlap in overlaps]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    return Overlap(
        sum(overlap.rank_a for overlap in overlaps),
        sum(overlap.rank_b for overlap in overlaps),
        *(average(name) for name in ("left", "right", "left_by_chance", "right_by_chance")),
    )
