"""ComfyUI's folders with a set of image pairs, for the tests of their routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_base.pair_folders import write_pairs


@pytest.fixture
def roots(comfyui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """ComfyUI's folders, empty."""
    from qwen_edit_lora.nodes import host
    from qwen_edit_lora.nodes.datasets import pair_sets, pair_views

    roots = {name: tmp_path / "comfy" / name for name in ("datasets", "input", "output")}
    for path in roots.values():
        path.mkdir(parents=True)
    monkeypatch.setattr(
        host, "list_dataset_roots", lambda: {name: [str(path)] for name, path in roots.items()}
    )
    for known in (pair_sets._known, pair_views._opened, pair_views._facts):
        known.clear()
    return roots


@pytest.fixture
def folder(roots: dict[str, Path]) -> Path:
    return write_pairs(roots["input"] / "animals", 3)
