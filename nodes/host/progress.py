"""Long work inside a node: its progress bar and the user's interrupt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils


def raise_if_interrupted() -> None:
    """Raises the exception ComfyUI expects from a node that the user interrupted."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    return comfy.model_management.processing_interrupted()


def build_progress() -> Callable[[int, int], None]:
    """The progress bar of the running node, as a callback for the core: (done, total)."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


def run_with_progress(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a long-running function of the core with a progress bar; the user can interrupt it."""
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
    """Calls function(*args, should_stop); an InterruptedError ends the prompt as interrupted."""
    try:
        return function(*args, comfy.model_management.processing_interrupted)
    except InterruptedError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from None
