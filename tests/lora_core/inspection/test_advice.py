"""The first sentence of an inspection and of a comparison."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import compare_adapters, inspect_adapter
from qwen_edit_lora.lora_core.adapter.adapter import Adapter
from qwen_edit_lora.lora_core.adapter.weights import LoraWeights
from qwen_edit_lora.lora_core.inspection.advice import advise_comparison, advise_inspection

PATH = "transformer_blocks.0.attn.to_q"
SIDE = 64
DIRECTIONS = torch.linalg.qr(torch.randn(SIDE, 8, generator=torch.Generator().manual_seed(1)))[0]


def build_adapter(delta: torch.Tensor) -> Adapter:
    """With this delta, of shape (SIDE, SIDE), on one module."""
    return Adapter({PATH: LoraWeights(torch.eye(SIDE), delta, alpha=float(SIDE))})


def draw_delta(std: float) -> torch.Tensor:
    return std * torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        (5e-4, "Use strength 1: the delta is as large as that of known-good LoRAs (std 0.0001 to"),
        (5e-3, "Start with strength 0.2: the delta is larger than that of known-good LoRAs"),
        (2.5e-5, "Start with strength 4: the delta is smaller than that of known-good LoRAs"),
        (0.0, "Do not use this file: it changes nothing at any strength."),
    ],
)
def test_an_inspection_starts_with_the_strength_to_use(std, expected):
    inspection = inspect_adapter(build_adapter(draw_delta(std)))
    assert advise_inspection(inspection).startswith(expected)


def test_the_strength_for_a_2_1_lora_says_which_loras_were_measured():
    weights = LoraWeights(torch.eye(SIDE), draw_delta(5e-3), alpha=float(SIDE))
    adapter = Adapter({"transformer_blocks.0.img_mlp.out": weights})
    expected = "Start with strength 0.2: the delta is larger than that of known-good LoRAs of Qwen-"
    assert advise_inspection(inspect_adapter(adapter)).startswith(f"{expected}Image-Edit (std")


def test_a_damaged_file_is_not_to_be_used():
    inspection = inspect_adapter(build_adapter(torch.full((SIDE, SIDE), torch.nan)))
    assert advise_inspection(inspection) == "Do not use this file: it holds NaN or Inf."


def compare(a: torch.Tensor, b: torch.Tensor) -> str:
    return advise_comparison(compare_adapters(build_adapter(a), build_adapter(b)))


def pair(i: int, j: int) -> torch.Tensor:
    """One of several deltas of norm 1 that are orthogonal to each other."""
    return torch.outer(DIRECTIONS[:, i], DIRECTIONS[:, j])


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        (pair(0, 0), "Use either: both make the same edit (cosine 1.000), equally strong."),
        (0.5 * pair(0, 0), "Use either: both make the same edit (cosine 1.000); b needs 2 times"),
        (2 * pair(0, 0), "Use either: both make the same edit (cosine 1.000); a needs 2 times"),
        (pair(1, 1), "Stack them if you like: they change different things"),
        (-pair(0, 0), "Do not stack them at full strength: 100 % of the weaker one is cancelled."),
        (pair(0, 0) + pair(1, 1), "Use one of them, or stack both at lower strengths: they share"),
        (-0.25 * pair(0, 0) + pair(1, 1), "Stack them with care: they pull apart (cosine -0.24)."),
        (0 * pair(0, 0), "Leave b out: its delta is zero, it changes nothing."),
    ],
)
def test_a_comparison_starts_with_whether_to_stack_the_two(b, expected):
    assert compare(pair(0, 0), b).startswith(expected)
