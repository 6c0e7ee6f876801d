"""The math of weight deltas, as functions of tensors.

Shapes: base_weight and every delta are (out_features, in_features), as torch.nn.Linear stores
them. All of it is computed in float32 unless float64 tensors come in.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError, ShapeError


def low_rank(lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * lora_B @ lora_A (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""
    lora_A, lora_B = upcast_together(lora_A, lora_B)
    return scale * (lora_B @ lora_A)


def kronecker(w1: torch.Tensor, w2: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * kron(w1, w2), LoKr (Yeh et al. 2023, arXiv 2309.14859, section 3.2)."""
    w1, w2 = upcast_together(w1, w2)
    return scale * torch.kron(w1, w2)


def hadamard(
    w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""
    w1_a, w1_b, w2_a, w2_b = upcast_together(w1_a, w1_b, w2_a, w2_b)
    return scale * (w1_a @ w1_b) * (w2_a @ w2_b)


def apply_magnitude(
    direction_delta: torch.Tensor, magnitude: torch.Tensor, base_weight: torch.Tensor
) -> torch.Tensor:
    """DoRA: magnitude * (W + delta) / ||W + delta|| - W (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    The norm is that of W + delta, as PEFT and LyCORIS define it. ComfyUI 0.30 divides by ||W||
    when the magnitude is along the output axis (comfy/weight_adapter/base.py, weight_decompose).

    Args:
        magnitude: (out_features,) or (out_features, 1): one per output row; (1, in_features): one
            per input column, as early LyCORIS files store it.
    """
    direction_delta = direction_delta.to(base_weight.device)
    base, direction_delta, magnitude = upcast_together(base_weight, direction_delta, magnitude)
    tuned = base + direction_delta
    if magnitude.ndim == 1 or magnitude.shape[-1] == 1:
        norm = tuned.norm(dim=1, keepdim=True)
        magnitude = magnitude.reshape(-1, 1)
    else:
        norm = tuned.norm(dim=0, keepdim=True)
    return tuned / norm.clamp_min(torch.finfo(norm.dtype).tiny) * magnitude - base


def rotate(
    blocks: torch.Tensor,
    base_weight: torch.Tensor,
    constraint: float = 0.0,
    rescale: torch.Tensor | None = None,
) -> torch.Tensor:
    """OFT: R^T W - W with R block-diagonal orthogonal (Qiu et al. 2023, arXiv 2306.07280).

    R = (I + Q)(I - Q)^-1 is the Cayley transform of Q = blocks - blocks^T, which is shrunk to
    Frobenius norm `constraint` where that is positive and exceeded.

    Args:
        blocks: (num_blocks, size, size) with num_blocks * size = out_features.
        rescale: (out_features, 1), a gain per output row after the rotation.
    """
    base, blocks = upcast_together(base_weight, blocks)
    num_blocks, size, _ = blocks.shape
    if num_blocks * size != base.shape[0]:
        raise ShapeError(
            "{num_blocks} OFT blocks of size {size} rotate {num_rows} rows, but the base "
            "weight has {base_shape}; choose an adapter that was trained for this model",
            num_blocks=num_blocks,
            size=size,
            num_rows=num_blocks * size,
            base_shape=base.shape[0],
        )
    skew = blocks - blocks.transpose(1, 2)
    if constraint > 0:
        norm = skew.norm() + 1e-8
        skew = skew * min(1.0, constraint / norm.item())
    identity = torch.eye(size, dtype=skew.dtype, device=skew.device)
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    rows = base.reshape(num_blocks, size, -1)
    turned = torch.einsum("knm,kni->kmi", rotation, rows).reshape(base.shape)
    if rescale is not None:
        turned = turned * upcast(rescale).reshape(-1, 1)
    return turned - base


def need_base_weight(base_weight: torch.Tensor | None, kind: str) -> torch.Tensor:
    if base_weight is None:
        raise ConfigError(
            "the delta of {kind} weights depends on the base weight; pass base_weight=...",
            kind=kind,
        )
    return base_weight


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def upcast_together(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All in float64 where one of them is, else all in float32: products need one dtype."""
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [tensor.to(widest) for tensor in tensors]
