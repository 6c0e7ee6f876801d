"""Test adapters, and their deltas computed densely in float64."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    Composition,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
)
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, COLUMNS = 96, 80
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
TO_V = "transformer_blocks.0.attn.to_v"


def make_lora(rank: int = 6, alpha: float | None = None, dtype=torch.float32) -> LoraWeights:
    decay = torch.logspace(0, -1.5, rank)
    lora_A, lora_B = torch.randn(rank, COLUMNS), torch.randn(ROWS, rank) * decay
    return LoraWeights(lora_A.to(dtype), lora_B.to(dtype), alpha)


def make_loha(rank: int) -> LohaWeights:
    shapes = ((ROWS, rank), (rank, COLUMNS)) * 2
    return LohaWeights(*(torch.randn(shape) for shape in shapes), alpha=2.0)


def make_lokr(alpha: float | None = None) -> LokrWeights:
    return LokrWeights(w1=torch.randn(4, 8), w2=torch.randn(24, 10), alpha=alpha)


def make_adapter(modules: dict[str, ModuleWeights], name: str = "adapter", **rest) -> Adapter:
    return Adapter(modules, name=name, **rest)


def compute_dense(weights: ModuleWeights) -> torch.Tensor:
    """float64, so that it can judge differences of 1e-7."""
    if isinstance(weights, LoraWeights):
        return weights.scale * weights.lora_B.double() @ weights.lora_A.double()
    return weights.delta().double()


def truncate(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * values[:rank] @ vh[:rank]


def compute_retained(delta: torch.Tensor, kept: torch.Tensor) -> float:
    return 1 - ((delta - kept).square().sum() / delta.square().sum()).item()


def check_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


def check_figures(found: Composition, deltas: dict[str, torch.Tensor]) -> None:
    """The reported energies are those of the stored tensors against the true deltas."""
    lost = energy = 0.0
    for path, delta in deltas.items():
        kept = compute_dense(found.adapter.modules[path])
        assert found.retained[path] == pytest.approx(compute_retained(delta, kept), abs=1e-6)
        residual = (delta - kept).norm().item()
        assert found.residual[path] == pytest.approx(
            residual, rel=1e-4, abs=1e-6 * delta.norm().item()
        )
        lost, energy = lost + residual**2, energy + delta.square().sum().item()
    assert found.total_retained == pytest.approx(1 - lost / energy, abs=1e-6)


KINDS = {
    "LoHa with factors": lambda: make_loha(2),
    "wide LoHa": lambda: make_loha(30),
    "LoKr": make_lokr,
    "LoKr in parts": lambda: LokrWeights(
        w1=torch.randn(4, 8), w2_a=torch.randn(24, 2), w2_b=torch.randn(2, 10), alpha=1.0
    ),
    "wide LoKr": lambda: LokrWeights(
        w1=torch.randn(4, 8), w2_a=torch.randn(24, 9), w2_b=torch.randn(9, 10), alpha=2.0
    ),
    "diff": lambda: DiffWeights(torch.randn(ROWS, COLUMNS)),
}


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation inside returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result
