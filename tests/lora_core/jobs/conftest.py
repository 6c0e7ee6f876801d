"""A store, the files its jobs need, and workers that do not outlive their test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.jobs.store import JobStore

for name, path in (
    ("tiny", Path(__file__).parent.with_name("training") / "tiny.py"),
    ("tiny_jobs", Path(__file__).with_name("tiny_jobs.py")),
):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file of two blocks, a training set and an empty loras folder."""
    from tiny_jobs import make_material

    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For workers: tiny products spread over busy cores take minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    from tiny_jobs import kill_workers

    store = JobStore(tmp_path / "jobs_root")
    yield store
    kill_workers(store.root)
    store.index.close()
