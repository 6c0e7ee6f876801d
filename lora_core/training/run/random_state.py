"""The state of every random number generator a run may draw from, as tensors and JSON."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

RandomState = tuple[dict[str, torch.Tensor], dict[str, Any]]


def collect_random_state() -> RandomState:
    """Python's, numpy's, torch's, and that of every CUDA device this process uses."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gaussian = cast(Any, np.random.get_state())
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda_{index}"] = state
    numbers = {
        "python": [version, gauss],
        "numpy": [name, position, has_gauss, cached_gaussian],
    }
    return tensors, numbers


def restore_random_state(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """The inverse of `collect_random_state`; missing CUDA devices are left out."""
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached_gaussian = numbers["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached_gaussian))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda_{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)


def seed_everything(seed: int) -> None:
    """Where a run starts from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
