"""A job, and ComfyUI's folders with a set of image pairs, for the tests of their routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.dit import write_dit
from demo_base.pair_folders import write_pairs
from demo_base.pair_page import Page, read_tree


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


@pytest.fixture
def page(routes: Any, folder: Path) -> Page:
    return Page(routes, "input/animals")


@pytest.fixture
def unchanged(roots: dict[str, Path]) -> Iterator[Callable[[], None]]:
    """Asserts that no file changed since the test began, and again at its end."""
    folder = roots["input"].parent
    before: dict[str, bytes | None] = {}

    def check() -> None:
        now = read_tree(folder)
        before.update(now if not before else {})
        assert now == before

    yield check
    check()


@pytest.fixture
def job_id(routes: Any, tmp_path: Path) -> Any:
    """A paused job; deleted after the test."""
    from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

    for name in ("data", "loras"):
        (tmp_path / name).mkdir()
    write_dit(tmp_path / "base.safetensors", "2509", "fp32")
    train = {
        "name": "tiny",
        "output": "unused",
        "steps": 6,
        "model": {"source": str(tmp_path / "base.safetensors"), "device": "cpu"},
        "data": {"folder": str(tmp_path / "data")},
    }
    job_id = routes.store.submit(config_from_dict(train), loras=str(tmp_path / "loras"))
    routes.store.pause(job_id)
    yield job_id
    for job in routes.store.list():
        routes.store.delete(job.id)
