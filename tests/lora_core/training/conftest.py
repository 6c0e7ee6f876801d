"""Makes what tests share importable, and keeps tiny products on one core."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for name in ("tiny", "small_bases", "counted_bytes"):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where other processes keep the cores busy, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
