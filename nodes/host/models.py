"""A MODEL: its modules, weights, patcher and wrappers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...lora_core.messages import message
from .places import Place

#: Sampled from a GGUF weight for its norm.
MAX_DECODED_ROWS = 512


def get_modules(model: ModelPatcher) -> Mapping[str, torch.nn.Module]:
    """Module path -> module of the diffusion model, for everything that holds a weight.

    Linears are included even if their weight has another name, as in models of other extensions.
    """
    return {
        path: module
        for path, module in model.model.diffusion_model.named_modules()
        if has_weight(module) or hasattr(module, "in_features")
    }


def has_weight(module: torch.nn.Module) -> bool:
    """Whether the module has a weight that ComfyUI could patch."""
    return getattr(module, "weight", None) is not None


def describe_model(model: ModelPatcher) -> tuple[str, str | None]:
    """The model's class name in ComfyUI, and for Qwen-Image whether it is the 2511 variant.

    The variant is "2511" where the file carries the marker for zero-timestep references
    (comfy/model_detection.py); the other variants cannot be distinguished by their weights.
    """
    method = getattr(model.model.diffusion_model, "default_ref_method", None)
    variant = "2511" if method == "index_timestep_zero" else None
    return type(model.model).__name__, variant


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and where ComfyUI offloads it to."""

    dtype: torch.dtype
    load_device: torch.device
    offload_device: torch.device


def get_placement(model: ModelPatcher) -> Placement:
    """The dtype is that of activations: the manual cast dtype if weights are stored in another."""
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        dtype = torch.bfloat16
    return Placement(dtype, model.load_device, model.offload_device)


def describe_storage(module: torch.nn.Module) -> tuple[str, bool]:
    """How a weight is stored, and whether a merged one is rounded to less than 16 bits there.

    ("scaled float8_e4m3fn", True), ("GGUF Q4_K", False): ComfyUI-GGUF patches decoded weights.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return str(getattr(module, "precision", type(module).__name__)), True
    if is_gguf(weight) and not weight.is_floating_point():
        return f"GGUF {weight.tensor_type.name}", False
    quantised = getattr(weight, "_qdata", None)  # of comfy-kitchen's QuantizedTensor
    dtype = (weight if quantised is None else quantised).dtype
    name = str(dtype).removeprefix("torch.")
    return (name if quantised is None else f"scaled {name}"), dtype.itemsize < 2


class Norm(NamedTuple):
    """A Frobenius norm, or the reason why there is none."""

    value: float | None
    reason: str = ""


def measure_weight(model: ModelPatcher, place: Place) -> Norm:
    """Frobenius norm of a weight as loaded, without patches; for GGUF from a sample of rows."""
    key = f"diffusion_model.{place.module_path}.weight"
    if not has_weight(model.get_model_object(f"diffusion_model.{place.module_path}")):
        return Norm(None, message("it has no weight of its own"))
    kept = model.backup.get(key)  # the original, if the module holds a patched one
    weight = model.get_model_object(key) if kept is None else kept.weight
    share = 1.0
    if hasattr(weight, "_qdata"):
        weight = take_part(weight.dequantize(), place)
    elif is_gguf(weight) and not weight.is_floating_point():
        name = weight.tensor_type.name
        try:
            weight, share = decode_rows(weight, place)
        except ImportError:
            return Norm(
                None, message("it is a GGUF's and the gguf package is missing: pip install gguf")
            )
        except NotImplementedError:
            return Norm(None, message("the gguf package cannot decode {name}", name=name))
    # Another subclass may encode its values in any way, and it inherits every method.
    elif type(weight) not in (torch.Tensor, torch.nn.Parameter) and not is_gguf(weight):
        return Norm(None, message("it is stored as a {name}", name=type(weight).__name__))
    else:
        weight = take_part(weight, place)
    if not weight.is_floating_point():
        return Norm(
            None,
            message(
                "it is stored as {weight_dtype}",
                weight_dtype=str(weight.dtype).removeprefix("torch."),
            ),
        )
    norm = weight.detach().float().norm(dtype=torch.float64).item() / math.sqrt(share)
    if norm > 0 and math.isfinite(norm):
        return Norm(norm)
    return Norm(None, message("its norm is {norm:g}", norm=norm))


def is_gguf(weight: torch.Tensor) -> bool:
    """Whether it is a GGMLTensor of ComfyUI-GGUF: uint8 codes, or floats."""
    return hasattr(weight, "tensor_type") and hasattr(weight, "tensor_shape")


def take_part(rows: torch.Tensor, place: Place) -> torch.Tensor:
    return rows if place.num_parts == 1 else rows.chunk(place.num_parts)[place.part]


def decode_rows(weight: Any, place: Place) -> tuple[torch.Tensor, float]:
    """float32 values of evenly spaced rows of a GGMLTensor, and their share of the place's rows.

    ComfyUI-GGUF decodes some 20 million weights a second on one core.
    """
    import gguf

    # The subclass hides the shape of the codes.
    codes = take_part(weight.as_subclass(torch.Tensor), place)
    rows = codes[:: math.ceil(len(codes) / MAX_DECODED_ROWS)]
    values = gguf.quants.dequantize(rows.cpu().numpy(), weight.tensor_type)
    return torch.from_numpy(values), len(rows) / len(codes)


def get_options(model: ModelPatcher) -> dict[str, Any]:
    """This clone's own transformer_options, passed to every call of the diffusion model."""
    return model.model_options.setdefault("transformer_options", {})


def find_merge_reason(model: ModelPatcher) -> str | None:
    """Why forwards of this clone must not be swapped during a call; None if they may."""
    # A compiled model would be recompiled at each change of forwards.
    if model.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):  # comfy_api/torch_helpers
        return message("torch.compile is on this MODEL")
    # Each GPU's thread runs its own copy, and only models from loaders can be copied.
    if model.get_additional_models_with_key("multigpu"):
        return message("this MODEL is split over several GPUs")
    # Gradient checkpointing reruns blocks after the call, when the forwards are restored.
    if comfy.model_management.in_training:
        return message("a node trains on this MODEL")
    return None


def add_wrapper(model: ModelPatcher, kind: str, key: str, wrapper: Callable) -> None:
    """Registers `wrapper` once per `key`; `kind` is "diffusion_model" or "prepare_sampling"."""
    wrapper_type = {
        "diffusion_model": WrappersMP.DIFFUSION_MODEL,
        "prepare_sampling": WrappersMP.PREPARE_SAMPLING,
    }[kind]
    model.remove_wrappers_with_key(wrapper_type, key)
    model.add_wrapper_with_key(wrapper_type, key, wrapper)
