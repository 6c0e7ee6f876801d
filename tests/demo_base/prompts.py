"""Prompts in ComfyUI's API format, written node by node."""

from __future__ import annotations

from typing import Any


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt; its title, which errors name, is its type.

    Args:
        inputs: values, or `[node name, output number]` for what is connected.
    """
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
