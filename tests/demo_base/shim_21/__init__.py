"""Lets the stock UNETLoader of ComfyUI 0.30 load the tiny Qwen-Image-2.1 of this folder.

ComfyUI knows 2.1 from version 0.37 on; where it does, this installs nothing. Before, the model is
diffusers' own class with ComfyUI's Linears and arguments. What is ComfyUI's own in 2.1 and not
imitated: its detection, its prefix cache, its kernels, its nodes.
Test-only: sits in custom_nodes/ of a throw-away base directory, has no nodes, is never shipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import comfy.supported_models_base
import diffusers.models.transformers.transformer_qwenimage21 as theirs
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # none; without the name ComfyUI calls the import failed

IMAGE_MODEL = "qwen_image21"
HAS_ITS_OWN = importlib.util.find_spec("comfy.ldm.qwen_image21") is not None


class FusedFeedForward(torch.nn.Module):
    """gate_layer and proj in one Linear, and the SwiGLU folded into the next, as in ComfyUI."""

    def __init__(self, width: int, mlp_width: int, operations: Any, **options: Any):
        super().__init__()
        self.gate_up = operations.Linear(width, 2 * mlp_width, bias=False, **options)
        self.out = operations.Linear(mlp_width, width, bias=False, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return comfy.ops.linear_input_act(self.out, self.gate_up(x), "swiglu")


@contextlib.contextmanager
def building_with(operations: Any, fused: bool, **options: Any) -> Iterator[None]:
    """diffusers' class is built from ComfyUI's Linears, which cast, quantise and are patched."""
    linear, feed_forward = torch.nn.Linear, theirs.QwenImage21SwiGLUFeedForward

    def build_fused(hidden_size: int, mlp_hidden_size: int) -> FusedFeedForward:
        return FusedFeedForward(hidden_size, mlp_hidden_size, operations, **options)

    torch.nn.Linear = functools.partial(operations.Linear, **options)
    if fused:
        theirs.QwenImage21SwiGLUFeedForward = build_fused
    try:
        yield
    finally:
        torch.nn.Linear, theirs.QwenImage21SwiGLUFeedForward = linear, feed_forward


class QwenImage21(theirs.QwenImage21Transformer2DModel):
    """Takes ComfyUI's arguments: x (batch, 64, rows, columns), raw text, references, slots."""

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        ref_latents: Any = None,
        image_slots: Any = None,
        transformer_options: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self.run, self, wrappers)
        return executor.execute(x, timestep, context, ref_latents, image_slots, options)

    def run(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        ref_latents: Any,
        image_slots: Any,
        transformer_options: dict[str, Any],
    ) -> torch.Tensor:
        references, (batch, _, rows, columns) = list(ref_latents or ()), x.shape
        slots = list(image_slots or ())
        slots += [context.shape[1]] * (len(references) - len(slots))
        texts, mask, start = [], [], 0
        for reference, slot in zip(references, slots, strict=True):
            # Four latent pixels per placeholder of the text encoder's.
            count = math.prod(reference.shape[-2:]) // 4
            placeholder = context.new_zeros(batch, count, context.shape[-1])
            texts += [context[:, start:slot], placeholder]
            mask += [False] * (slot - start) + [True] * count
            start = slot
        texts.append(context[:, start:])
        mask += [False] * (context.shape[1] - start) + [True] * (rows * columns // 4)
        images = [*references, x]
        with recording_blocks(self, x, transformer_options):
            tokens = super().forward(
                torch.cat([list_tokens(image, batch) for image in images], 1),
                torch.cat(texts, 1),
                timestep,
                [[(1, *image.shape[-2:]) for image in images]] * batch,
                torch.tensor(mask, device=x.device)[None].expand(batch, -1),
                return_dict=False,
            )[0][:, -rows * columns :]
        return tokens.transpose(1, 2).reshape(batch, -1, rows, columns)


def list_tokens(image: torch.Tensor, batch: int) -> torch.Tensor:
    return image.expand(batch, -1, -1, -1).flatten(2).transpose(1, 2)


@contextlib.contextmanager
def recording_blocks(
    model: QwenImage21, x: torch.Tensor, options: dict[str, Any]
) -> Iterator[None]:
    """Calls the patches "single_block" after each block, with the target's tokens last."""
    patches = options.get("patches", {}).get("single_block", [])
    handles = []
    for index, block in enumerate(model.transformer_blocks if patches else ()):

        def call(_: Any, __: Any, tokens: torch.Tensor, index: int = index) -> torch.Tensor:
            for patch in patches:
                values = {"img": tokens, "x": x, "block_index": index}
                tokens = patch(values | {"transformer_options": options})["img"]
            return tokens

        handles.append(block.register_forward_hook(call))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_model(
    image_model: str,
    fused_mlp: bool,
    dtype: torch.dtype,
    device: Any,
    operations: Any,
    **config: Any,
) -> QwenImage21:
    with building_with(operations, fused_mlp, dtype=dtype, device=device):
        model = QwenImage21(**config)
    # Not diffusers' own `to`, which warns.
    torch.nn.Module.to(model, dtype)
    return model


class LatentFormat(comfy.latent_formats.LatentFormat):
    latent_channels = 64
    latent_dimensions = 2
    spacial_downscale_ratio = 16


class BaseModel(comfy.model_base.BaseModel):
    def __init__(self, config: Any, device: Any = None):
        flow = comfy.model_base.ModelType.FLUX
        super().__init__(config, flow, device=device, unet_model=build_model)
        self.memory_usage_factor_conds = ("ref_latents",)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        found = super().extra_conds(**kwargs)
        text, references = kwargs.get("cross_attn"), kwargs.get("reference_latents")
        if text is not None:
            found["c_crossattn"] = comfy.conds.CONDRegular(text)
        if references is not None:
            raw = [self.process_latent_in(reference) for reference in references]
            found["ref_latents"] = comfy.conds.CONDList(raw)
        if kwargs.get("image_slots") is not None:
            found["image_slots"] = comfy.conds.CONDConstant(kwargs["image_slots"])
        return found

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        references = kwargs.get("reference_latents")
        if references is None:
            return {}
        return {"ref_latents": [1, 64, sum(math.prod(one.shape) for one in references) // 64]}


class SupportedModel(comfy.supported_models_base.BASE):
    unet_config: ClassVar[dict[str, Any]] = {"image_model": IMAGE_MODEL}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"multiplier": 1.0, "shift": 0.69}
    latent_format = LatentFormat
    memory_usage_factor = 6.0
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    vae_key_prefix: ClassVar[list[str]] = ["vae."]
    text_encoder_key_prefix: ClassVar[list[str]] = ["text_encoders."]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> BaseModel:
        return BaseModel(self, device=device)

    def clip_target(self, state_dict: Any = None) -> None:
        return None


def read_config(state_dict: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """Arguments of `build_model` read from shapes; None if this is no 2.1."""
    text_norm = state_dict.get(f"{prefix}txt_in.text_norm.weight")
    if text_norm is None or f"{prefix}modulation.1.weight" not in state_dict:
        return None
    head = state_dict[f"{prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
    width, channels = state_dict[f"{prefix}img_in.weight"].shape
    frame_axis = max(2, head // 8 // 2 * 2)  # 16 of 128 in the real model; every axis is even
    side_axis = (head - frame_axis) // 2 // 2 * 2
    blocks = prefix + "transformer_blocks.{}."
    return {
        "image_model": IMAGE_MODEL,
        "fused_mlp": f"{prefix}transformer_blocks.0.img_mlp.gate_up.weight" in state_dict,
        "in_channels": channels,
        "out_channels": state_dict[f"{prefix}proj_out.weight"].shape[0],
        "num_layers": comfy.model_detection.count_blocks(list(state_dict), blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "context_in_dim": text_norm.shape[0],
        "axes_dims_rope": (head - 2 * side_axis, side_axis, side_axis),
    }


def install() -> None:
    comfy.supported_models.models.insert(0, SupportedModel)
    original = comfy.model_detection.detect_unet_config

    @functools.wraps(original)
    def detect_unet_config(
        state_dict: dict[str, Any], key_prefix: str, metadata: dict[str, str] | None = None
    ) -> dict[str, Any] | None:
        found = read_config(state_dict, key_prefix)
        return found or original(state_dict, key_prefix, metadata=metadata)

    comfy.model_detection.detect_unet_config = detect_unet_config


# Once, also under two module names.
if not HAS_ITS_OWN and not getattr(comfy.supported_models, "_tiny_qwen_21_installed", False):
    install()
    comfy.supported_models._tiny_qwen_21_installed = True
