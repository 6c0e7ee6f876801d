"""With QWEN_EDIT_LORA_GPU=1 ComfyUI computes on the GPU in the dtypes that it uses on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ..conftest import FULL_PRECISION, multiply_in_full_precision

pytestmark = pytest.mark.comfy

CUDA = torch.device("cuda:0")
TYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def on_a_gpu(comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """ComfyUI's choice of dtypes as on an NVIDIA GPU of compute capability 9.0."""
    management = comfyui.model_management
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "is_nvidia", lambda: True)
    monkeypatch.setattr(management, "LORA_COMPUTE_DTYPES", {})
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    return management


def list_types(management: SimpleNamespace) -> dict[str, torch.dtype | None]:
    return {
        "model": management.unet_dtype(CUDA, 10**6, TYPES, torch.float32),
        "model of bf16": management.unet_manual_cast(torch.bfloat16, CUDA, TYPES),
        "model of fp8": management.unet_manual_cast(torch.float8_e4m3fn, CUDA, TYPES),
        "LoRA": management.lora_compute_dtype(CUDA),
        "VAE": management.vae_dtype(CUDA, TYPES),
        "text encoder": management.text_encoder_dtype(CUDA),
    }


def test_everything_is_computed_in_float32(on_a_gpu, monkeypatch):
    for name in ("supports_fp8_compute", "supports_mxfp8_compute", "supports_nvfp4_compute"):
        monkeypatch.setattr(on_a_gpu, name, getattr(on_a_gpu, name))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = list_types(on_a_gpu)
    assert torch.float32 not in before.values()
    assert on_a_gpu.supports_fp8_compute(CUDA)

    assert FULL_PRECISION == ("--force-fp32", "--fp32-text-enc")
    monkeypatch.setattr(on_a_gpu, "FORCE_FP32", True)  # how ComfyUI uses it when imported
    monkeypatch.setattr(on_a_gpu.args, "fp32_text_enc", True)
    on_a_gpu.LORA_COMPUTE_DTYPES.clear()
    multiply_in_full_precision(on_a_gpu)
    after = list_types(on_a_gpu)
    assert after == dict.fromkeys(before, torch.float32)
    assert not on_a_gpu.supports_fp8_compute(CUDA)
    assert not torch.backends.cudnn.allow_tf32
