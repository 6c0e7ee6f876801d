"""A MODEL: its modules, weights, patcher and wrappers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

ModelPatcher = comfy.model_patcher.ModelPatcher


def get_modules(model: ModelPatcher) -> Mapping[str, torch.nn.Module]:
    """Module path -> module of the diffusion model, for everything that holds a weight."""
    return {
        path: module
        for path, module in model.model.diffusion_model.named_modules()
        if getattr(module, "weight", None) is not None
    }


def describe_model(model: ModelPatcher) -> tuple[str, str | None]:
    """The model's class name in ComfyUI, and for Qwen-Image whether it is a 2511.

    The variant is "2511" where the file carries the marker for zero-timestep references
    (comfy/model_detection.py); the other variants cannot be told apart by their weights.
    """
    method = getattr(model.model.diffusion_model, "default_ref_method", None)
    variant = "2511" if method == "index_timestep_zero" else None
    return type(model.model).__name__, variant


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and where ComfyUI puts it meanwhile."""

    dtype: torch.dtype
    load_device: torch.device
    offload_device: torch.device


def get_placement(model: ModelPatcher) -> Placement:
    """The dtype is that of activations: the manual cast's if weights are stored in another."""
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        dtype = torch.bfloat16
    return Placement(dtype, model.load_device, model.offload_device)


def describe_storage(module: torch.nn.Module) -> tuple[str, int]:
    """How a weight is stored, and the bytes of one element: ("scaled float8_e4m3fn", 1)."""
    weight = module.weight
    quantised = getattr(weight, "_qdata", None)  # of comfy-kitchen's QuantizedTensor
    dtype = (weight if quantised is None else quantised).dtype
    name = str(dtype).removeprefix("torch.")
    return (name if quantised is None else f"scaled {name}"), dtype.itemsize


def measure_weight(model: ModelPatcher, module_path: str) -> float | None:
    """Frobenius norm of a weight as loaded, without patches; None where it cannot be read."""
    key = f"diffusion_model.{module_path}.weight"
    kept = model.backup.get(key)  # the original, while the module holds a patched one
    weight = model.get_model_object(key) if kept is None else kept.weight
    if hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    if not weight.is_floating_point():
        return None
    norm = weight.detach().float().norm(dtype=torch.float64).item()
    return norm if norm > 0 and math.isfinite(norm) else None


def get_options(model: ModelPatcher) -> dict[str, Any]:
    """This clone's own transformer_options; it reaches every call of the diffusion model."""
    return model.model_options.setdefault("transformer_options", {})


def find_merge_reason(model: ModelPatcher) -> str | None:
    """Why forwards of this clone must not be swapped during a call; None if they may."""
    # A compiled model would be compiled anew for each change of forwards.
    if model.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):  # comfy_api/torch_helpers
        return "torch.compile is on this MODEL"
    # One thread per GPU runs a model of its own, and only loaders' models can be copied to them.
    if model.get_additional_models_with_key("multigpu"):
        return "this MODEL is split over several GPUs"
    # Gradient checkpointing runs blocks again after the call, when the forwards are back.
    if comfy.model_management.in_training:
        return "a node trains on this MODEL"
    return None


def add_wrapper(model: ModelPatcher, kind: str, key: str, wrapper: Callable) -> None:
    """Registers `wrapper` once per `key`; `kind` is "diffusion_model" or "prepare_sampling"."""
    wrapper_type = {
        "diffusion_model": WrappersMP.DIFFUSION_MODEL,
        "prepare_sampling": WrappersMP.PREPARE_SAMPLING,
    }[kind]
    model.remove_wrappers_with_key(wrapper_type, key)
    model.add_wrapper_with_key(wrapper_type, key, wrapper)


def build_linear(weight: torch.Tensor) -> torch.nn.Module:
    """A Linear without bias whose weight ComfyUI may offload, page and cast."""
    linear = comfy.ops.manual_cast.Linear(
        weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def get_resident_weight(linear: torch.nn.Module, like: torch.Tensor) -> torch.Tensor | None:
    """The weight if it can be used as it is beside `like`; None if ComfyUI has to bring it."""
    weight = linear.weight
    is_ready = (
        weight.device == like.device
        and weight.dtype == like.dtype
        and not hasattr(linear, "_v")  # paged by dynamic VRAM
        and not linear.weight_function
    )
    return weight if is_ready else None


def wrap_in_patcher(module: torch.nn.Module, placement: Placement) -> ModelPatcher:
    """A patcher of its own, so that ComfyUI loads, offloads and accounts for `module`."""
    # Looked up at call time: main.py swaps in the dynamic-VRAM class after import.
    return comfy.model_patcher.CoreModelPatcher(
        module, placement.load_device, placement.offload_device
    )
