"""Errors of nodes in the user's language: ComfyUI shows the text of an exception as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..lora_core.errors import LoraError
from . import host


def translate_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The same class, whose methods raise and return the same errors in the user's language."""
    for name in ("execute", "validate_inputs"):
        if name in vars(node):
            setattr(node, name, classmethod(translate_error(vars(node)[name].__func__)))
    return node


def translate_error(work: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(work, "__signature__"):
        return work  # ComfyUI loads an extension once, tests more often

    @functools.wraps(work)
    def translated(*args: Any, **kwargs: Any) -> Any:
        try:
            result = work(*args, **kwargs)
        except LoraError as e:
            e.args = (host.translate(e.message),)
            raise
        return host.translate(result) if isinstance(result, str) else result

    # ComfyUI looks up which inputs a validation takes, and does not look through a wrapper.
    translated.__signature__ = inspect.signature(work)  # type: ignore[attr-defined]
    return translated
