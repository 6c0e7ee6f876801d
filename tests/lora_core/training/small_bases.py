"""Base models of random weights, of any size."""

from __future__ import annotations

import torch
from qwen_edit_lora.lora_core.training.model.architecture import Architecture
from safetensors.torch import save_file

TINY = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64}


def write_base(path, num_layers: int, **sizes: int) -> str:
    """In ComfyUI's naming, bf16; `sizes` are Architecture's."""
    # Only tests on a card write full-width ones, which a CPU would take minutes to generate.
    device = "cpu" if sizes or not torch.cuda.is_available() else "cuda"
    model = Architecture(num_layers=num_layers, **sizes).build_empty().to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, path)
    return str(path)
