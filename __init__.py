"""Qwen Edit LoRA: ComfyUI nodes for LoRAs of Qwen-Image-Edit.

ComfyUI calls `comfy_entrypoint`. Nothing of ComfyUI is imported before that, so that tests and
the training worker can import the package alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import QwenEditLoraExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> QwenEditLoraExtension:
    try:
        from .nodes import QwenEditLoraExtension
    except Exception:
        # ComfyUI logs only the message of an exception here, which hides where it came from.
        logging.getLogger(__name__).exception("Qwen Edit LoRA: the nodes could not be imported")
        raise
    return QwenEditLoraExtension()
