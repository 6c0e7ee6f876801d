"""Everything this extension asks of ComfyUI. The only module that imports comfy.* and folder_paths.

Written against ComfyUI 0.30.
"""

from __future__ import annotations

import gc
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder, is_link

from ..lora_core import FileError, ModuleWeights, compute_delta
from ..lora_core.stored import load, shorten
from ..lora_core.strengths import Strengths

ModelPatcher = comfy.model_patcher.ModelPatcher

# --- files --------------------------------------------------------------------------------------


def list_loras() -> list[str]:
    return [n for n in folder_paths.get_filename_list("loras") if n.endswith(".safetensors")]


def find_lora(lora_name: str | None) -> Path:
    """Full path of a file below one of the loras folders.

    Raises:
        FileError: no such file, or a name that points outside these folders.
    """
    name = lora_name or ""
    parts = Path(name.replace("\\", "/")).parts
    if not name or ".." in parts or Path(name).is_absolute() or ":" in name or "\0" in name:
        raise FileError(
            f"{shorten(name)!r} is no name inside the loras folders; expected a file such as "
            "'my_lora.safetensors', chosen from the list."
        )
    try:
        path = folder_paths.get_full_path("loras", name)
    except OSError as e:
        raise FileError(f"{shorten(name)} cannot be opened: {e.strerror}.") from None
    if path is None:
        raise FileError(
            f"{shorten(name)} is not in the loras folders (any more); expected one of the "
            f"{len(list_loras())} files there. Put it into models/loras, press R, and choose it."
        )
    return Path(path)


def find_lora_files() -> dict[str, Path]:
    """Name in the loaders' list -> path, of every file in the loras folders, pickles included."""
    names = folder_paths.get_filename_list("loras")
    paths = {name: folder_paths.get_full_path("loras", name) for name in names}
    return {name: Path(path) for name, path in paths.items() if path is not None}


def list_diffusion_models() -> list[str]:
    names = folder_paths.get_filename_list("diffusion_models")
    return [name for name in names if name.endswith(".safetensors")]


def find_diffusion_model(model_name: str) -> Path:
    """Full path of a file below one of the diffusion_models folders.

    Raises:
        FileError: no such file.
    """
    # Only names from the list: those cannot point outside.
    known = model_name in list_diffusion_models()
    path = folder_paths.get_full_path("diffusion_models", model_name) if known else None
    if path is None:
        raise FileError(
            f"{shorten(model_name)!r} is not in the diffusion_models folders; expected a "
            ".safetensors file there. Put it into models/diffusion_models, press R, and choose it."
        )
    return Path(path)


def choose_output_path(filename_prefix: str) -> Path:
    """A path without suffix, below ComfyUI's output folder, that no file has yet."""
    output = folder_paths.get_output_directory()
    folder = Path(output, os.path.dirname(os.path.normpath(filename_prefix)))  # noqa: PTH120
    if not folder_paths.is_within_directory(output, str(folder)):
        raise FileError(
            f"{shorten(filename_prefix)!r} points outside the output folder; expected a name "
            "such as 'loras/my_lora'."
        )
    try:
        found = folder_paths.get_save_image_path(filename_prefix, output)
    except OSError as e:
        raise FileError(f"{shorten(filename_prefix)} cannot be written: {e.strerror}.") from None
    folder, filename, counter, *_ = found
    return Path(folder, f"{filename}_{counter:05}_")


def name_below_output(path: Path) -> str:
    return path.relative_to(folder_paths.get_output_directory()).as_posix()


def list_dataset_roots() -> dict[str, list[str]]:
    """Name -> folders that training pictures may lie in."""
    return {
        "datasets": folder_paths.get_folder_paths("datasets"),
        "input": [folder_paths.get_input_directory()],
        "output": [folder_paths.get_output_directory()],
    }


def is_within_directory(directory: str, path: Path) -> bool:
    """Whether a path, links followed, is inside."""
    return folder_paths.is_within_directory(directory, str(path))


def get_cache_folder() -> Path:
    """Where results may be kept over restarts; no HTTP route serves it. May not exist yet."""
    return Path(folder_paths.get_system_user_directory("qwen_edit_lora"))


def get_jobs_folder() -> Path:
    """Where training jobs live over restarts; no HTTP route serves it. May not exist yet."""
    return get_cache_folder() / "training"


def get_loras_folder() -> Path:
    """Where a new LoRA goes: the first of the folders that every loader lists."""
    return Path(folder_paths.get_folder_paths("loras")[0])


# --- memory -------------------------------------------------------------------------------------


def get_device_name() -> str:
    """The device ComfyUI computes on: "cpu", "cuda:0", ..."""
    device = comfy.model_management.get_torch_device()
    return device.type if device.index is None and device.type == "cpu" else str(device)


def release_models() -> None:
    """Takes every model off ComfyUI's device. Only while a node runs, so that none is in use."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def raise_if_interrupted() -> None:
    """Raises what ComfyUI expects of a node that the user interrupted."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    return comfy.model_management.processing_interrupted()


# --- long work ----------------------------------------------------------------------------------


def build_progress() -> Callable[[int, int], None]:
    """The progress bar of the running node, as the core wants it: (done, in all)."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


def run_with_progress(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a long function of the core; the user sees how far it is and can interrupt it."""
    try:
        return function(
            *args,
            progress=build_progress(),
            should_stop=comfy.model_management.processing_interrupted,
            **kwargs,
        )
    except InterruptedError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from None


def run_interruptible(function: Callable[..., Any], *args: Any) -> Any:
    """Calls function(*args, should_stop); an InterruptedError ends the prompt as a user's stop."""
    try:
        return function(*args, comfy.model_management.processing_interrupted)
    except InterruptedError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from None


COMPUTE_DEVICES = ("auto", "cpu")
#: What one layer of the model takes while it is decomposed: its difference and some products.
COMPUTE_BYTES = 2 << 30


def choose_compute_device(name: str) -> torch.device:
    """ComfyUI's device for "auto", with room made on it; the CPU otherwise."""
    if name != "auto":
        return torch.device("cpu")
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        comfy.model_management.free_memory(COMPUTE_BYTES, device)
    return device


# --- graphs -------------------------------------------------------------------------------------

Link = list
"""[node id, output index], as in a graph of the API."""


def build_graph() -> GraphBuilder:
    """An empty graph for the running node to expand into."""
    return GraphBuilder()


def get_links(dynprompt: Any, node_id: str) -> dict[str, Link]:
    """Input -> where it comes from, for the connected inputs of a node of the running graph."""
    inputs = dynprompt.get_node(node_id)["inputs"]
    return {name: value for name, value in inputs.items() if is_link(value)}


def find_wired_outputs(dynprompt: Any, node_id: str) -> set[int]:
    """Which outputs of a node another one takes."""
    return {
        link[1]
        for other in dynprompt.all_node_ids()
        for link in get_links(dynprompt, other).values()
        if link[0] == node_id
    }


def block_output(message: str) -> ExecutionBlocker:
    """A value that stops every node it reaches, with this message."""
    return ExecutionBlocker(message)


# --- sampling -----------------------------------------------------------------------------------


def list_samplers() -> list[str]:
    return list(comfy.samplers.KSampler.SAMPLERS)


def list_schedulers() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


class _PredictionSampler(comfy.samplers.Sampler):
    """In the place of a sampler: one model call per sigma, each on the latent noised to it."""

    def __init__(self, record: Callable[[int, torch.Tensor, torch.Tensor], None]):
        self.record = record

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
        sampling = model_wrap.inner_model.model_sampling
        for index, sigma in enumerate(sigmas):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x = sampling.noise_scaling(sigma, noise, latent_image)
            denoised = model_wrap(x, sigma.expand(len(x)), **extra_args)
            self.record(index, x, denoised)
        return noise


def predict(
    model: ModelPatcher,
    positive: Any,
    latent: Mapping[str, Any],
    sigmas: list[float],
    seed: int,
    record: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Calls the model once per sigma as a sampler at cfg 1 does, and samples nothing.

    Args:
        record: gets (index of the sigma, x, denoised), both float32 on the model's device.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.sample(noise, samples, _PredictionSampler(record), torch.tensor(sigmas), seed=seed)


def add_block_recorder(model: ModelPatcher, record: Callable[[int, torch.Tensor], None]) -> None:
    """`record` gets (block, image tokens) after each block of this clone.

    The tokens are (batch, tokens, width), those of the references left out.
    """

    def watch(values: dict[str, Any]) -> dict[str, Any]:
        tokens = values["img"]
        references = values["transformer_options"].get("reference_image_num_tokens", ())
        record(values["block_index"], tokens[:, : tokens.shape[1] - sum(references)])
        return values

    model.set_model_double_block_patch(watch)


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (1, 16, 1, H, W) as the VAE gave them -> images (n, height, width, 3) in [0, 1]."""
    images = vae.decode(latents)
    return images.reshape(-1, *images.shape[-3:])


# --- encoding -----------------------------------------------------------------------------------


def get_stock_encoder(class_name: str) -> Any:
    """The class of ComfyUI's own node that encodes a prompt with its pictures."""
    from comfy_extras import nodes_qwen

    return getattr(nodes_qwen, class_name)


def scale_area(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(1, h, w, 3) -> (1, height, width, 3) as the stock encoders scale."""
    scaled = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "area", "disabled")
    return scaled.movedim(1, -1)


def list_weights(patcher: ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all weights as loaded, without patches."""
    for key, tensor in patcher.model.state_dict().items():
        kept = patcher.backup.get(key)  # the original, while the module holds a patched one
        yield key, tensor if kept is None else kept.weight


# --- models -------------------------------------------------------------------------------------


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


# --- merging ------------------------------------------------------------------------------------


class MergedWeights(comfy.weight_adapter.WeightAdapterBase):
    """Lets ComfyUI's patcher add a delta computed here, for kinds it has not or computes otherwise.

    ComfyUI 0.30 divides a DoRA by the wrong norm and squares an OFT's strength
    (comfy/weight_adapter/base.py and oft.py).

    `weights` is the module's weights, then their tensors one by one: ComfyUI finds them there to
    count, pin and prefetch them, and puts the moved ones into a copy of this object
    (comfy/lora.py, prefetch_prepared_value). Dynamic VRAM fails on a patch without any tensor.
    """

    name = "qwen_edit_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[ModuleWeights, ...]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def wrap(cls, weights: ModuleWeights) -> MergedWeights:
        return cls(set(), (weights, *(load(tensor) for tensor in weights.parts.values())))

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        stored, *tensors = self.weights
        parts = dict(zip(stored.parts, tensors, strict=True))
        module_weights = stored.with_parts(parts).to(weight.device)
        delta = compute_delta(module_weights, weight).reshape(weight.shape)
        weight += function((strength * delta).to(weight.dtype))
        return weight


def build_patch(weights: ModuleWeights) -> Any:
    """ComfyUI's own patch where it computes the same, so that its memory management knows it."""
    if weights.kind == "LoRA":
        values = (weights.lora_B, weights.lora_A, weights.alpha, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), values)
    if weights.kind == "diff" and weights.shape is not None:
        return ("diff", (weights.part("diff"),))
    return MergedWeights.wrap(weights)


def add_merge(
    model: ModelPatcher, modules: Mapping[str, ModuleWeights], strengths: Strengths
) -> None:
    """Adds native patches to this clone: the weights and biases of `modules`."""
    by_strength: dict[float, dict[str, Any]] = defaultdict(dict)
    for path in strengths.select(modules):
        weights, patches = modules[path], by_strength[strengths.resolve(path)]
        if weights.kind != "diff" or weights.shape is not None:
            patches[f"diffusion_model.{path}.weight"] = build_patch(weights)
        if weights.bias_delta is not None:
            patches[f"diffusion_model.{path}.bias"] = ("diff", (weights.bias_delta,))
    for strength, patches in by_strength.items():
        model.add_patches(patches, strength)
