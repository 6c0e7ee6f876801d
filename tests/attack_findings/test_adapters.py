"""Attack findings: adapters loaded without a word as something else than ComfyUI applies."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import LoraError
from qwen_edit_lora.lora_core.adapter.weights import compute_delta
from qwen_edit_lora.lora_core.formats.files import read_state_dict

PATH = "transformer_blocks.0.attn.to_q"
STEM = f"diffusion_model.{PATH}"
OUT, IN = 12, 6
#: Findings that state where alpha came from, not that something is missing.
OF_ALPHA = ("alpha_from_rank", "alpha_from_field")


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def is_reported(adapter) -> bool:
    report = adapter.report
    others = [finding for finding in report.found if finding.kind not in OF_ALPHA]
    return bool(report.unmatched or report.duplicates or report.non_finite or others)


def make_lokr_with_leftovers() -> dict[str, torch.Tensor]:
    """w2 is whole, and its factors are there too: ComfyUI (lokr.py) takes the whole one, and the
    scale is alpha over the inner dimension of w1, the only factorised factor in use."""
    return {
        f"{STEM}.lokr_w1_a": make(3, 3),
        f"{STEM}.lokr_w1_b": make(3, 3),
        f"{STEM}.lokr_w2": make(4, 2),
        f"{STEM}.lokr_w2_a": make(4, 1),
        f"{STEM}.lokr_w2_b": make(1, 2),
        f"{STEM}.alpha": torch.tensor(3.0),
    }


def test_a_lokr_with_a_whole_factor_and_its_parts_has_the_scale_of_what_is_used():
    tensors = make_lokr_with_leftovers()
    try:
        adapter = read_state_dict(tensors)
    except LoraError:
        return  # refusing it is right as well
    w1 = tensors[f"{STEM}.lokr_w1_a"] @ tensors[f"{STEM}.lokr_w1_b"]
    expected = 3.0 / 3 * torch.kron(w1, tensors[f"{STEM}.lokr_w2"])
    assert torch.allclose(compute_delta(adapter.modules[PATH]), expected, atol=1e-6)


def test_parts_of_a_lokr_that_are_not_used_are_reported():
    try:
        adapter = read_state_dict(make_lokr_with_leftovers())
    except LoraError:
        return
    assert is_reported(adapter)


def test_a_module_takes_both_factors_from_one_spelling():
    """Of lora_A alone and a whole pair lora_down, lora_up, the pair belongs together; ComfyUI's
    LoRAAdapter.load never mixes two spellings."""
    tensors = {
        f"{STEM}.lora_A.weight": make(2, IN),
        f"{STEM}.lora_down.weight": make(2, IN) + 1,
        f"{STEM}.lora_up.weight": make(OUT, 2),
    }
    try:
        adapter = read_state_dict(tensors)
    except LoraError:
        return
    expected = tensors[f"{STEM}.lora_up.weight"] @ tensors[f"{STEM}.lora_down.weight"]
    assert torch.allclose(compute_delta(adapter.modules[PATH]), expected, atol=1e-6)


@pytest.mark.parametrize("part", ["diff_b", "dora_scale"])
def test_what_else_a_module_of_rank_0_changes_is_kept_or_reported(part):
    """Its report says that such modules add nothing, but the bias (or the magnitude) would act."""
    other = "diffusion_model.transformer_blocks.1.attn.to_q"
    value = make(OUT) if part == "diff_b" else make(OUT, 1)
    tensors = {
        f"{STEM}.lora_A.weight": torch.zeros(0, IN),
        f"{STEM}.lora_B.weight": torch.zeros(OUT, 0),
        f"{STEM}.{part}": value,
        f"{other}.lora_A.weight": make(2, IN),
        f"{other}.lora_B.weight": make(OUT, 2),
    }
    adapter = read_state_dict(tensors)
    dropped = [key.key for key in adapter.report.unmatched]
    assert PATH in adapter.modules or f"{STEM}.{part}" in dropped


def test_a_block_number_with_leading_zeros_names_no_second_module():
    """ComfyUI has no module transformer_blocks.00: its loader leaves such keys out."""
    tensors = {}
    for number in ("0", "00"):
        stem = f"diffusion_model.transformer_blocks.{number}.attn.to_q"
        tensors[f"{stem}.lora_A.weight"] = make(2, IN)
        tensors[f"{stem}.lora_B.weight"] = make(OUT, 2)
    adapter = read_state_dict(tensors)
    assert list(adapter.modules) == [PATH]
    assert is_reported(adapter)
