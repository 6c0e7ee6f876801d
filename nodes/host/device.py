"""ComfyUI's device and the models on it."""

from __future__ import annotations

import gc

import comfy.model_management
import torch

COMPUTE_DEVICES = ("auto", "cpu")
#: Memory that one layer of the model takes while it is decomposed: its difference and products.
COMPUTE_BYTES = 2 << 30


def get_device_name() -> str:
    """The device ComfyUI computes on: "cpu", "cuda:0", ..."""
    device = comfy.model_management.get_torch_device()
    return device.type if device.index is None and device.type == "cpu" else str(device)


def release_models() -> None:
    """Unloads all models from ComfyUI's device. Only inside a running node: none is in use then."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def choose_compute_device(name: str) -> torch.device:
    """ComfyUI's device for "auto", after freeing memory on it; otherwise the CPU."""
    if name != "auto":
        return torch.device("cpu")
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        comfy.model_management.free_memory(COMPUTE_BYTES, device)
    return device
