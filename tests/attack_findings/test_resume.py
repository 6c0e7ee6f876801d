"""Attack findings: a run resumed on another base model without a word."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core.disk.content_samples import sample_contents
from safetensors.torch import save_file


@pytest.mark.parametrize("inner", [".", "transformer"])
def test_another_model_in_a_diffusers_folder_is_noticed(tmp_path, inner):
    """`open_folder` also takes a pipeline's folder, with the model in `transformer`; its digest
    must not be that of an empty folder."""
    folder = tmp_path / "Qwen-Image-Edit-2509"
    (folder / inner).mkdir(parents=True)
    path = folder / inner / "diffusion_pytorch_model.safetensors"
    digests = []
    for seed in (0, 1):
        tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        save_file({"transformer_blocks.0.attn.to_q.weight": tensor}, path)
        digests.append(sample_contents(folder))
    assert digests[0] != digests[1]
