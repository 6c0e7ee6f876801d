"""Makes shared test modules importable, and keeps tiny products on one core."""

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
    """On busy cores, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A real device of each kind; CPU runs here say nothing about a GPU's timing."""
    return torch.device(request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Every kernel sums in a fixed order; one that cannot raises an error.

    On a GPU attention's backward pass sums in arbitrary order, so that two runs differ by rounding.
    """
    torch.use_deterministic_algorithms(True)  # with warn_only attention would stay as it is
    yield
    torch.use_deterministic_algorithms(False)
