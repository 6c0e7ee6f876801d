"""The side path against ComfyUI's own LoraLoader, on the tiny true architecture."""

from __future__ import annotations

import pytest
import torch

from .conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5  # float32 base, two steps


def test_side_path_equals_patched_weights(base, sample, make_lora, apply_native, apply_ours):
    path = make_lora("a", seed=1)
    expected = sample(apply_native(base, path, 0.7))
    assert worst(sample(apply_ours(base, path, 0.7)), expected) < ROUNDING
    assert worst(sample(base), expected) > 100 * ROUNDING
