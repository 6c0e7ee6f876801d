"""How a LoRA starts.

In "kaiming", "gaussian" and "orthogonal" lora_A is random and lora_B is 0, so that the first
forward is bit-identical to the base's. "pissa" (Meng et al. 2024, arXiv 2404.02948) starts on the
base weight's own leading singular vectors, see `compute_principal_factors`.

Random numbers are drawn on the CPU from a generator per module, so that neither the device nor the
choice of other targets changes them.
"""

from __future__ import annotations

import zlib

import torch

from ..adapter.delta import upcast
from ..algebra.truncation import compute_leading_svd

INITIALIZATIONS = ("kaiming", "gaussian", "orthogonal", "pissa")


def make_generator(module_path: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {module_path}".encode()))


def draw_down(init: str, rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """A starting lora_A, float32 (rank, in_features).

    kaiming: uniform within 1 / sqrt(in), as PEFT and kohya start (He et al. 2015, with a = sqrt 5).
    gaussian: normal with standard deviation 1 / rank, as PEFT's "gaussian".
    orthogonal: orthonormal rows (columns, where the rank is above in_features).
    """
    lora_A = torch.empty(rank, in_features)
    if init == "kaiming":
        bound = in_features**-0.5
        return lora_A.uniform_(-bound, bound, generator=generator)
    if init == "gaussian":
        return lora_A.normal_(std=1 / rank, generator=generator)
    return torch.nn.init.orthogonal_(lora_A, generator=generator)


def compute_principal_factors(
    base_weight: torch.Tensor, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA's start: scale * up @ down is the best approximation of the base weight at `rank`.

    Args:
        base_weight: (out, in), any float dtype, on any device.

    Returns:
        down (rank, in) and up (out, rank), each with the square root of the singular values.
    """
    weight = upcast(base_weight)
    u, values, vh = compute_leading_svd(weight, rank)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
