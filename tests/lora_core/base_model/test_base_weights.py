"""Weights of a base that are no matrices."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.base_model.base_weights import open_base

TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_weight_that_is_a_single_number_is_refused(dtype):
    base = open_base(
        {f"{TO_Q}.weight": torch.ones(4, 4), f"{TO_K}.weight": torch.tensor(1.0).to(dtype)}
    )
    assert base.get(TO_Q).values.shape == (4, 4)
    with pytest.raises(FileError, match="to_k as a single number; expected a matrix"):
        base.get(TO_K)
