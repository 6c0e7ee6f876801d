"""Imports this checkout under the name ComfyUI gives it, and the benchmarks that parts share."""

from __future__ import annotations

import sys

from .settings import ROOT


def import_extension() -> None:
    """Makes `qwen_edit_lora` importable; once is enough."""
    if "qwen_edit_lora" in sys.modules:
        return
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from apply import import_extension as import_by_path

    import_by_path()
