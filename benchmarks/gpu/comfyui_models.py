"""ComfyUI in this process: its own Qwen-Image model with random weights, and calls of the model.

With dynamic VRAM, `start_comfyui` must be called before anything imports torch, as in ComfyUI's
main.py.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .extension import import_extension
from .settings import ROOT, Context, Sizes

SEED = 7


def start_comfyui(device: str, dynamic: bool, keep_on_card: bool = False) -> str:
    """Imports ComfyUI as its main.py starts it on this device.

    Args:
        dynamic: whether to use dynamic VRAM, main.py's default on NVIDIA GPUs.
        keep_on_card: like --highvram.

    Returns:
        Why there is no dynamic VRAM although it was requested, or "".
    """
    control = None
    if dynamic:
        try:
            import comfy_aimdo.control as control

            if not start_aimdo(control):
                control = None
        except (ImportError, OSError):
            control = None
    import_extension()
    from apply import import_host

    import_host(device)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    args.highvram = keep_on_card
    if device == "cuda":
        import cuda_malloc  # noqa: F401  chooses torch's allocator, if torch is not imported yet
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    logging.getLogger().setLevel(logging.WARNING)
    if not dynamic:
        return ""
    if device == "cpu":
        return "dynamic VRAM needs a card; ComfyUI's patcher for the CPU stands in"
    if control is None:
        return "comfy-aimdo does not load"
    devices = [device.index for device in management.get_all_torch_devices()]
    if not control.init_devices(devices):
        return "comfy-aimdo finds no card that it works on"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return ""


def start_aimdo(control: Any) -> bool:
    """Like main.py; releases before 0.4.11 have fewer options."""
    try:
        return bool(control.init(nvml_pressure=True))
    except TypeError:
        return bool(control.init())


def load_model(state_dict: dict[str, Any], storage: str) -> Any:
    """Loads like the stock loader: ComfyUI's detection, model class and patcher."""
    import comfy.sd
    import torch

    allow_small_models()
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    options = {"dtype": dtypes[storage]} if storage in dtypes else {}
    return comfy.sd.load_diffusion_model_state_dict(dict(state_dict), options)


def allow_small_models() -> None:
    """ComfyUI supports one width only; the tests' shim reads it from the weights."""
    name = "gpu_check_shim"
    if name in sys.modules:
        return
    folder = ROOT / "tests" / "demo_base" / "shim"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def build_resident_model(sizes: Sizes, num_blocks: int, device: str) -> Any:
    """A bf16 model whose weights are generated in place on the device."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    from .bases import STD

    config = comfy.supported_models.QwenImage(
        {
            "image_model": "qwen_image",
            "num_layers": num_blocks,
            "attention_head_dim": sizes.head_width,
            "num_attention_heads": sizes.heads,
            "joint_attention_dim": sizes.text_width,
            "axes_dims_rope": sizes.axes,
        }
    )
    config.set_inference_dtype(torch.bfloat16, None)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    model = comfy.model_base.QwenImage(config, device=where)
    torch.manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        is_gain = parameter.ndim == 1 and name.endswith(".weight")
        parameter.fill_(1) if is_gain else parameter.normal_(std=STD)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=where, offload_device=where)


@dataclass
class Calls:
    """Times and predictions of several calls of a model."""

    seconds: list[float] = field(default_factory=list)
    """Of each call after the first, which also loads."""
    predictions: list[Any] = field(default_factory=list)
    """The predicted velocity of each call, float32 on the CPU."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def call_model(
    model: Any,
    context: Context,
    side: int,
    calls: int,
    watch: Callable[[int], None] = lambda index: None,
    keep: bool = True,
) -> Calls:
    """Calls a MODEL once per noise level through ComfyUI's sampling, with one reference.

    Args:
        side: side length of the latents.
        watch: called with the number of each call right after it, with the device idle.
        keep: whether to keep the predictions.
    """
    import torch
    from qwen_edit_lora.nodes.host.sampling import predict

    from .devices import synchronize

    sizes, found = context.sizes, Calls()
    generator = torch.Generator().manual_seed(SEED)
    reference = torch.randn(1, 16, 1, side, side, generator=generator)
    text = torch.randn(1, sizes.text_tokens[-1], sizes.text_width, generator=generator)
    positive = [[text, {"reference_latents": [reference]}]]
    latent = {"samples": torch.zeros(1, 16, 1, side, side)}
    sigmas = [1 - index / (2 * (calls + 1)) for index in range(calls + 1)]
    ended: list[float] = []

    def record(index: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        synchronize(context.device)
        now = time.perf_counter()
        if ended:
            found.seconds.append(now - ended[-1])
        if keep:
            found.predictions.append(((x - denoised) / sigmas[index]).float().cpu())
        watch(index)
        synchronize(context.device)
        ended.append(time.perf_counter())

    with torch.inference_mode():
        predict(model, positive, latent, sigmas, SEED, record)
    return found


def apply(model: Any, *layers: tuple[Any, float], mode: str = "side path") -> Any:
    """Applies adapters at their strengths to a MODEL with our Apply."""
    import torch
    from qwen_edit_lora.lora_core.adapter.strengths import Strengths
    from qwen_edit_lora.nodes.patching import application

    adapters = [(adapter, Strengths(strength)) for adapter, strength in layers]
    with torch.inference_mode():
        return application.apply_adapters(model, adapters, mode).model


def measure_difference(found: list[Any], expected: list[Any]) -> float:
    """Largest relative difference in norm between the calls' predictions; NaN counts as inf."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        difference = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def count_swapped_forwards(model: Any) -> int:
    """Number of modules of the base with a swapped forward; 0 unless a call left some."""
    return sum("forward" in module.__dict__ for module in model.model.diffusion_model.modules())
