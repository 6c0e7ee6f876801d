"""What merging leaves of a delta, predicted against rounding for real."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import FileError, KeyFormatError
from qwen_edit_lora.lora_core.base_weights import BaseWeight, open_base
from qwen_edit_lora.lora_core.survival import GRIDS, measure_error, predict_error
from safetensors.torch import save_file

STORAGES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "e4m3": (torch.float8_e4m3fn, False),
    "e5m2": (torch.float8_e5m2, False),
    "scaled e4m3": (torch.float8_e4m3fn, True),
}


def make_base(storage: str, std: float = 0.02) -> BaseWeight:
    dtype, is_scaled = STORAGES[storage]
    values = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * std
    if not is_scaled:
        return BaseWeight(values.to(dtype), None)
    scale = (values.abs().max() / torch.finfo(dtype).max).item()
    return BaseWeight((values / scale).to(dtype), scale)


def make_delta(std: float) -> torch.Tensor:
    return torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * std


@pytest.mark.parametrize("std", [1e-4, 3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_prediction_is_within_15_percent_of_real_rounding(storage, std):
    base = make_base(storage)
    measured = measure_error(base, make_delta(std))
    assert predict_error(base, std) == pytest.approx(measured, rel=0.15)


def test_fp8_drowns_a_typical_lora_and_bf16_keeps_most_of_it():
    assert predict_error(make_base("e4m3"), 3e-4) > 1.5
    assert predict_error(make_base("bf16"), 3e-4) < 0.2


@pytest.mark.parametrize("dtype", GRIDS)
def test_the_spacing_is_the_distance_to_the_next_number(dtype):
    codes = torch.arange(1 << (8 * dtype.itemsize - 1), dtype=torch.int32)
    integers = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    numbers = codes.to(integers).view(dtype).float()
    numbers = numbers[torch.isfinite(numbers)]
    spacing = GRIDS[dtype].compute_spacing(numbers[1:-1])
    reached = spacing == numbers[2:] - numbers[1:-1]
    assert reached[numbers[1:-1] > 1e-37].all()


def test_a_float32_base_loses_nothing_worth_a_figure():
    weight = BaseWeight(torch.randn(4, 4), None)
    assert predict_error(weight, 1e-3) is None
    assert measure_error(weight, torch.ones(4, 4)) is None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_base_is_found_under_every_prefix_and_scaled_as_stored(prefix, tmp_path):
    path, stem = tmp_path / "base.safetensors", f"{prefix}transformer_blocks.0.attn.to_q"
    stored = torch.randn(8, 8).to(torch.float8_e4m3fn)
    save_file(
        {f"{stem}.weight": stored, f"{stem}.weight_scale": torch.tensor(0.25), "x": torch.ones(1)},
        path,
    )
    weight = open_base(path).get("transformer_blocks.0.attn.to_q")
    assert torch.equal(weight.values, stored.float() * 0.25)
    assert weight.storage == "scaled float8_e4m3fn"
    assert open_base(path).get("transformer_blocks.7.attn.to_q") is None


def test_another_models_file_is_refused_with_a_sentence(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(KeyFormatError, match=r"is no Qwen-Image model: none of its 1"):
        open_base(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("stored", "scale", "what"),
    [
        (torch.ones(4, 4, dtype=torch.int8), torch.ones(1), "as int8 with 1 scales"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4), "float8_e4m3fn with 4 scales"),
    ],
)
def test_a_storage_that_is_not_understood_is_refused_with_a_sentence(stored, scale, what):
    stem = "transformer_blocks.0.attn.to_q"
    base = open_base({f"{stem}.weight": stored, f"{stem}.weight_scale": scale})
    with pytest.raises(FileError, match=f"{what}, which cannot be read here yet; expected bf16"):
        base.get(stem)
