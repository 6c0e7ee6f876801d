"""How much of a delta survives a merge: our prediction against ComfyUI's own patcher."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight
from qwen_edit_lora.lora_core.base_model.base_weights import open_base
from qwen_edit_lora.lora_core.inspection.survival import find_peak, measure_error, predict_error

pytestmark = pytest.mark.comfy

ROWS, COLUMNS = 256, 512
PATH = "transformer_blocks.0.attn.to_q"
KEY = f"diffusion_model.{PATH}.weight"

#: storage -> format and options of ComfyUI's quantise function; a dtype where it has none.
STORAGES: dict[str, Any] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "scaled e4m3": ("float8_e4m3fn", {"scale": "recalculate"}),
    "scaled e5m2": ("float8_e5m2", {"scale": "recalculate"}),
    "mxfp8": ("mxfp8", {}),
    "int8": ("int8_tensorwise", {}),
    "int8 by row": ("int8_tensorwise", {"per_channel": True}),
    "int8 rotated": (
        "int8_tensorwise",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
    "int4 rotated": ("convrot_w4a4", {"convrot_groupsize": 64}),
}


def draw(std: float, seed: int) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * std


def store(storage: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The entries of a file as produced by ComfyUI's own quantise function."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    kind = STORAGES[storage]
    if isinstance(kind, torch.dtype):
        return {"weight": weight.to(kind)}
    name, options = kind
    quantised = QuantizedTensor.from_float(
        weight, QUANT_ALGOS[name]["comfy_tensor_layout"], **options
    )
    note = {"format": name} | {k: v for k, v in options.items() if k.startswith("convrot")}
    return {
        **quantised.state_dict("weight"),
        "comfy_quant": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8),
    }


def build_model(comfyui: SimpleNamespace, entries: dict[str, torch.Tensor]) -> Any:
    """ComfyUI's own Linear alone in a model under ComfyUI's ModelPatcher."""
    operations, dtype = comfyui.ops.manual_cast, entries["weight"].dtype
    if "comfy_quant" in entries:
        operations = comfyui.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32)
        dtype = torch.float32
    model = torch.nn.Module()
    holder = model
    for name in KEY.split(".")[:-2]:
        holder.add_module(name, torch.nn.Module())
        holder = holder.get_submodule(name)
    linear = operations.Linear(COLUMNS, ROWS, bias=False, device="cpu", dtype=dtype)
    holder.add_module("to_q", linear)
    prefix = KEY.removesuffix("weight")
    model.load_state_dict({prefix + name: tensor for name, tensor in entries.items()})
    cpu = torch.device("cpu")
    return comfyui.model_patcher.ModelPatcher(model, cpu, cpu)


def read(model: Any) -> torch.Tensor:
    weight = model.get_model_object(KEY)
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight).detach().float()


def merge(comfyui: SimpleNamespace, entries: dict[str, torch.Tensor], delta: torch.Tensor) -> Any:
    """The weight after ComfyUI has added the delta and stored it as it was."""
    model = build_model(comfyui, entries)
    with torch.inference_mode():
        model.add_patches({KEY: ("diff", (delta,))})
        model.patch_weight_to_device(KEY)
        return read(model).clone()


def open_weight(entries: dict[str, torch.Tensor]) -> BaseWeight:
    return open_base({f"{PATH}.{name}": t for name, t in entries.items()}).get(PATH)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_stored_weight_is_read_as_comfyui_reads_it(storage, comfyui):
    entries = store(storage, draw(0.02, 0))
    expected = read(build_model(comfyui, entries))
    found = open_weight(entries)
    assert found.values.shape == expected.shape
    assert torch.allclose(found.values, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(expected, torch.zeros_like(expected))


@pytest.mark.parametrize("std", [3e-5, 3e-4, 3e-3])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_prediction_is_within_15_percent_of_a_merge_by_comfyui(storage, std, comfyui):
    entries, delta = store(storage, draw(0.02, 0)), draw(std, 1)
    weight = open_weight(entries)
    exact = weight.values.double() + delta.double()
    merged = merge(comfyui, entries, delta)
    done = ((merged.double() - exact).norm() / delta.double().norm()).item()
    peak = find_peak(weight, weight.values, delta)
    assert predict_error(weight, std, peak) == pytest.approx(done, rel=0.15)
    assert measure_error(weight, delta, peak) == pytest.approx(done, rel=0.1)


@pytest.mark.parametrize("storage", ["fp8", "mxfp8"])
def test_a_delta_below_the_resolution_of_stochastic_rounding_is_lost(storage, comfyui):
    """fp8 goes through fp16 and 8 random bits: finer values never round up."""
    entries, delta = store(storage, draw(0.02, 0)), draw(3e-6, 1)
    weight = open_weight(entries)
    exact = weight.values.double() + delta.double()
    done = (merge(comfyui, entries, delta).double() - exact).norm() / delta.double().norm()
    assert predict_error(weight, 3e-6) == pytest.approx(done.item(), rel=0.15)


def test_an_int8_scale_of_one_dimension_becomes_one_per_row(comfyui):
    entries, delta = store("int8", draw(0.02, 0)), draw(3e-4, 1)
    entries["weight_scale"] = entries["weight_scale"].reshape(1)
    weight = open_weight(entries)
    merged = merge(comfyui, entries, delta).double()
    exact = weight.values.double() + delta.double()
    done = ((merged - exact).norm() / delta.double().norm()).item()
    assert find_peak(weight, weight.values, delta) is None
    assert predict_error(weight, 3e-4) == pytest.approx(done, rel=0.15)


def test_a_delta_of_zero_on_one_weight_moves_the_whole_grid_of_a_scaled_one(comfyui):
    """Why survival cannot use the old scale: one entry grows by a tenth, all others change."""
    entries = store("int8", draw(0.02, 0))
    weight = open_weight(entries)
    delta = torch.zeros(ROWS, COLUMNS)
    row, column = divmod(weight.values.abs().argmax().item(), COLUMNS)
    delta[row, column] = 0.1 * weight.values[row, column]
    merged = merge(comfyui, entries, delta)
    changed = (merged - weight.values).abs() > 1e-6
    assert changed.float().mean() > 0.8
    delta += draw(1e-4, 1)
    exact = weight.values.double() + delta.double()
    done = (merge(comfyui, entries, delta).double() - exact).norm() / delta.double().norm()
    peak, std = find_peak(weight, weight.values, delta), delta.std().item()
    assert measure_error(weight, delta, peak) == pytest.approx(done.item(), rel=0.05)
    assert predict_error(weight, std, peak) == pytest.approx(done.item(), rel=0.15)


def test_nvfp4_is_read_as_comfyui_reads_it_and_its_merge_is_not_predicted(comfyui):
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS["nvfp4"]["comfy_tensor_layout"]
    quantised = QuantizedTensor.from_float(draw(0.02, 0), layout)
    note = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    weight = open_weight({**quantised.state_dict("weight"), "comfy_quant": note})
    assert weight.storage == "nvfp4"
    torch.testing.assert_close(weight.values, quantised.dequantize(), rtol=1e-5, atol=1e-7)
    assert predict_error(weight, 3e-4) is None
