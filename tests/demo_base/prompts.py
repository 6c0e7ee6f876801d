"""Prompts in ComfyUI's API format, written node by node."""

from __future__ import annotations

from typing import Any


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt; its title, which errors name, is its type.

    Args:
        inputs: values, or `[node name, output number]` for what is connected.
    """
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def load_tiny_base() -> dict[str, Any]:
    """The nodes unet, clip and vae that load the demo base's float32 2509."""
    return {
        "unet": node("UNETLoader", unet_name="tiny_fp32_2509.safetensors", weight_dtype="default"),
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
    }
