"""How much of a delta survives merging: predictions against actual rounding."""

from __future__ import annotations

import json

import pytest
import torch
from qwen_edit_lora.lora_core import FileError, KeyFormatError
from qwen_edit_lora.lora_core.base_model.base_weight import rotate
from qwen_edit_lora.lora_core.base_model.base_weights import BaseWeight, open_base
from qwen_edit_lora.lora_core.inspection.survival import GRIDS, measure_error, predict_error
from safetensors.torch import save_file

PATH = "transformer_blocks.0.attn.to_q"
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


def test_a_float32_base_loses_nothing_significant():
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


def test_another_models_file_is_refused_with_a_message(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(KeyFormatError, match=r"is not a Qwen-Image model: none of its 1"):
        open_base(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("stored", "scale", "what"),
    [
        (torch.ones(4, 4, dtype=torch.int8), None, "as int8"),
        (torch.ones(4, 4, dtype=torch.uint8), torch.ones(1), "as uint8 with 1 scales"),
        (torch.ones(4, 4, dtype=torch.int8), torch.ones(2, 2), "as int8 with 4 scales"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(3), "float8_e4m3fn with 3 scales"),
        (torch.ones(4, 4).bfloat16(), torch.ones(4), "as bfloat16 with 4 scales"),
    ],
)
def test_a_storage_that_is_not_understood_is_refused_with_a_message(stored, scale, what):
    scales = {} if scale is None else {f"{PATH}.weight_scale": scale}
    base = open_base({f"{PATH}.weight": stored, **scales})
    with pytest.raises(FileError, match=f"{what}, which cannot be read here yet; expected bf16"):
        base.get(PATH)


@pytest.mark.parametrize("note", [b"{", b"[1]", b'{"format": "awq"}', b"{}", b'{"convrot": true}'])
def test_an_unknown_quantisation_note_is_refused_and_never_guessed(note):
    entries = {
        f"{PATH}.weight": torch.ones(4, 4, dtype=torch.int8),
        f"{PATH}.weight_scale": torch.ones(()),
        f"{PATH}.comfy_quant": torch.tensor(list(note), dtype=torch.uint8),
    }
    if note == b"{}":  # empty: treated as missing
        assert open_base(entries).get(PATH).storage == "scaled int8"
    else:
        with pytest.raises(FileError, match="which cannot be read here yet"):
            open_base(entries).get(PATH)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_one_scale_per_weight_or_row_gives_the_values(dtype, shape):
    stored = torch.arange(-12, 12).reshape(6, 4).to(dtype)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = open_base({f"{PATH}.weight": stored, f"{PATH}.weight_scale": scale}).get(PATH)
    expected = stored.float() * scale.reshape(-1, 1)
    assert torch.equal(weight.values, expected)
    assert torch.equal(weight.take_rows(torch.tensor([1, 4])).values, expected[[1, 4]])


def test_a_whole_files_note_in_its_metadata_is_read(tmp_path):
    layers = {f"model.diffusion_model.{PATH}": {"format": "nvfp4"}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    entries = {
        f"model.diffusion_model.{PATH}.weight": torch.ones(4, 4, dtype=torch.uint8),
        f"model.diffusion_model.{PATH}.weight_scale": torch.ones(4),
    }
    save_file(entries, tmp_path / "base.safetensors", metadata)
    with pytest.raises(FileError, match=f"stores {PATH} as nvfp4 with 4 scales"):
        open_base(tmp_path / "base.safetensors").get(PATH)


def test_a_file_with_exponent_scales_opens(tmp_path):
    scales = torch.full((128, 4), 128, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    entries = {
        f"{PATH}.weight": torch.ones(64, 64).to(torch.float8_e4m3fn),
        f"{PATH}.weight_scale": scales,
        f"{PATH}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
    }
    save_file(entries, tmp_path / "base.safetensors")
    weight = open_base(tmp_path / "base.safetensors").get(PATH)
    assert weight.storage == "mxfp8"
    assert torch.equal(weight.values, torch.full((64, 64), 2.0))


@pytest.mark.parametrize("group", [4, 16, 64])
def test_the_rotation_is_orthogonal_and_its_own_inverse(group):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated = rotate(values, group)
    assert not torch.allclose(rotated, values)
    assert torch.allclose(rotate(rotated, group), values)
    assert torch.allclose(rotated.norm(dim=1), values.norm(dim=1))
