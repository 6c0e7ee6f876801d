"""A LoRA of usual size on fp8 weights at full width: its effect on the layer's output."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, LoraWeights
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

pytestmark = pytest.mark.comfy

WIDTH, RANK, DELTA_STD = 3072, 16, 3e-4
PATH = "transformer_blocks.0.attn.to_q"


def build_layer(
    comfyui: SimpleNamespace, storage: str, weight: torch.Tensor, dtype: torch.dtype
) -> Any:
    """ComfyUI's own Linear in `storage`, alone in a model under ComfyUI's ModelPatcher."""
    ops, state_dict = comfyui.ops.manual_cast, {}
    stored = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}.get(storage)
    if storage == "fp8_scaled":
        ops = comfyui.ops.mixed_precision_ops({"mixed_ops": True}, dtype)
        scale = weight.abs().max() / 448
        format_json = json.dumps({"format": "float8_e4m3fn"}).encode()
        state_dict = {
            "weight": (weight / scale).to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "comfy_quant": torch.tensor(list(format_json), dtype=torch.uint8),
        }
    else:
        state_dict = {"weight": weight.to(stored)}
    linear = ops.Linear(WIDTH, WIDTH, bias=False, device="cpu", dtype=stored)

    class Layer(torch.nn.Module):
        manual_cast_dtype = dtype

        def __init__(self) -> None:
            super().__init__()
            attention = torch.nn.Module()
            attention.to_q = linear
            block = torch.nn.Module()
            block.attn = attention
            self.diffusion_model = torch.nn.Module()
            self.diffusion_model.transformer_blocks = torch.nn.ModuleList([block])

        def get_dtype(self) -> torch.dtype:
            return stored or dtype

    model = Layer()
    prefix = f"diffusion_model.{PATH}."
    model.load_state_dict({prefix + name: t for name, t in state_dict.items()}, strict=True)
    cpu = torch.device("cpu")
    return comfyui.model_patcher.ModelPatcher(model, cpu, cpu)


def run(ours: SimpleNamespace, comfyui: SimpleNamespace, model: Any, x: torch.Tensor):
    """The layer's output for `x`, through the wrappers of every model call."""
    import comfy.patcher_extension as extension

    comfyui.model_management.load_models_gpu([model])
    diffusion_model = model.model.diffusion_model
    wrappers = model.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL)
    layer = diffusion_model.get_submodule(PATH)
    executor = extension.WrapperExecutor.new_class_executor(
        lambda x, transformer_options: layer(x), diffusion_model, wrappers
    )
    return executor.execute(x, transformer_options=ours.host.get_options(model)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled"])
def test_a_small_delta_survives_on_an_fp8_base(storage, dtype, ours, comfyui, capsys):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) * 0.02
    lora_A = torch.randn(RANK, WIDTH, generator=generator).bfloat16()
    lora_B = (torch.randn(WIDTH, RANK, generator=generator) * DELTA_STD / RANK**0.5).bfloat16()
    adapter = Adapter({PATH: LoraWeights(lora_A, lora_B)}, name="small")
    x = torch.randn(8, WIDTH, generator=generator).bfloat16().to(dtype)
    own_output = x.double() @ (lora_B.double() @ lora_A.double()).T

    def compute_error(effect: torch.Tensor) -> float:
        return ((effect - own_output).norm() / own_output.norm()).item()

    errors = {}
    with torch.inference_mode():
        for mode in ("side path", "merge"):
            base = build_layer(comfyui, storage, weight, dtype)
            before = run(ours, comfyui, base, x)
            applied = ours.application.apply_adapters(base, [(adapter, Strengths(1.0))], mode)
            errors[mode] = compute_error(run(ours, comfyui, applied.model, x) - before)
    # Activations in bf16 lose some of the effect in any case: the exact sum, rounded.
    errors["rounding of the activations alone"] = compute_error(
        (before.double() + own_output).to(dtype).double() - before
    )
    with capsys.disabled():
        print(f"\n{storage}, activations {dtype}: relative error of the LoRA's output {errors}")  # noqa: T201
    assert errors["side path"] < 0.05 + errors["rounding of the activations alone"]
    assert errors["merge"] > 0.5
