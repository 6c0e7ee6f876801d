"""Lets the stock UNETLoader and CLIPLoader (qwen_image) load the shrunken base of this folder.

ComfyUI 0.30 hard-codes the widths of Qwen-Image (24 heads of 128, text width 3584) and of
Qwen2.5-VL; this reads them from the weights. A file of the real size takes ComfyUI's own path.
Test-only: sits in custom_nodes/ of a throw-away base directory, has no nodes, is never shipped.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.qwen_vl as qwen_vl

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # none; without the name ComfyUI calls the import failed

logger = logging.getLogger(__name__)

REAL_WIDTHS = (3072, 128, 3584)  # image stream, attention head, text: model.py's defaults
REAL_TEXT_HIDDEN = 3584  # llama.py, Qwen25_7BVLI_Config
TEXT_HEAD = 128  # there a class attribute, so it cannot shrink


def read_dit_config(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Keyword arguments of QwenImageTransformer2DModel read from shapes; {} at the real size."""
    inner = state_dict[f"{prefix}img_in.weight"].shape[0]
    joint = state_dict[f"{prefix}txt_norm.weight"].shape[0]
    norm_q = state_dict.get(f"{prefix}transformer_blocks.0.attn.norm_q.weight")
    if norm_q is None or (inner, norm_q.shape[0], joint) == REAL_WIDTHS:
        return {}
    head = norm_q.shape[0]
    time_axis = max(2, head // 8 // 2 * 2)  # 16 of 128 in the real model; every axis must be even
    side_axis = (head - time_axis) // 2 // 2 * 2
    return {
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": joint,
        "axes_dims_rope": (head - 2 * side_axis, side_axis, side_axis),
    }


def read_text_config(state_dict: dict[str, Any]) -> dict[str, int]:
    """Fields of Qwen25_7BVLI_Config read from shapes."""
    queries = state_dict["model.layers.0.self_attn.q_proj.weight"]
    keys = state_dict["model.layers.0.self_attn.k_proj.weight"]
    return {
        "vocab_size": state_dict["model.embed_tokens.weight"].shape[0],
        "hidden_size": queries.shape[1],
        "intermediate_size": state_dict["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count_blocks(state_dict, "model.layers.{}."),
        "num_attention_heads": queries.shape[0] // TEXT_HEAD,
        "num_key_value_heads": keys.shape[0] // TEXT_HEAD,
    }


def read_vision_config(state_dict: dict[str, Any]) -> dict[str, int]:
    """Arguments of Qwen2VLVisionTransformer read from shapes, with heads of 32."""
    hidden = state_dict["visual.patch_embed.proj.weight"].shape[0]
    return {
        "hidden_size": hidden,
        "intermediate_size": state_dict["visual.blocks.0.mlp.gate_proj.weight"].shape[0],
        "num_layers": count_blocks(state_dict, "visual.blocks.{}."),
        "num_heads": hidden // 32,
    }


def count_blocks(state_dict: dict[str, Any], prefix: str) -> int:
    """Number of consecutive blocks under a prefix with one `{}`."""
    return comfy.model_detection.count_blocks(list(state_dict), prefix)


def is_tiny_text_encoder(state_dicts: list[dict[str, Any]]) -> bool:
    """Whether this is one Qwen2.5-VL of another width than the real one."""
    if len(state_dicts) != 1:
        return False
    if comfy.sd.detect_te_model(state_dicts[0]) != comfy.sd.TEModel.QWEN25_7B:
        return False
    queries = state_dicts[0]["model.layers.0.self_attn.q_proj.weight"]
    return queries.shape[1] != REAL_TEXT_HIDDEN


def install_dit_detection() -> None:
    """Wraps ComfyUI's detection so that it fills in the widths of a shrunken DiT."""
    original = comfy.model_detection.detect_unet_config

    @functools.wraps(original)
    def detect_unet_config(
        state_dict: dict[str, Any], key_prefix: str, metadata: dict[str, str] | None = None
    ) -> dict[str, Any] | None:
        config = original(state_dict, key_prefix, metadata=metadata)
        if config is not None and config.get("image_model") == "qwen_image":
            config.update(read_dit_config(state_dict, key_prefix))
        return config

    comfy.model_detection.detect_unet_config = detect_unet_config


def install_text_encoder_loading() -> None:
    """Wraps ComfyUI's loader so that it builds a text encoder of the file's own width.

    The language side goes through ComfyUI's own model option; the vision tower has none, so the
    class that llama.py looks up is replaced during the call.
    """
    original = comfy.sd.load_text_encoder_state_dicts

    @functools.wraps(original)
    def load_text_encoder_state_dicts(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        state_dicts = bound.arguments.get("state_dicts", [])
        if not is_tiny_text_encoder(state_dicts):
            return original(*args, **kwargs)
        options = dict(bound.arguments.get("model_options", {}))
        options["qwen25_7b_model_config"] = read_text_config(state_dicts[0])
        bound.arguments["model_options"] = options
        vision_config = read_vision_config(state_dicts[0])
        real_class = qwen_vl.Qwen2VLVisionTransformer

        def build_vision(**arguments: Any) -> Any:
            return real_class(**{**arguments, **vision_config})

        qwen_vl.Qwen2VLVisionTransformer = build_vision
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            qwen_vl.Qwen2VLVisionTransformer = real_class

    comfy.sd.load_text_encoder_state_dicts = load_text_encoder_state_dicts


if not getattr(comfy.sd, "_tiny_qwen_installed", False):  # once, also under two module names
    install_dit_detection()
    install_text_encoder_loading()
    comfy.sd._tiny_qwen_installed = True
    logger.info("tiny Qwen-Image-Edit shim installed")
