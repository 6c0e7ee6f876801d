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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A real one of each kind; what runs on the CPU here finds nothing out on a GPU's time."""
    return torch.device(request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Every kernel adds in the same order each time; one that cannot is an error.

    On a GPU attention's backward pass adds as the work comes, so that two runs differ by rounding.
    """
    torch.use_deterministic_algorithms(True)  # with warn_only attention would stay as it is
    yield
    torch.use_deterministic_algorithms(False)
