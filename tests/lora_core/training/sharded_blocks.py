"""For test_processes.py, under `accelerate launch --use_fsdp`: `sharded_blocks.py BASE FOLDER`.

Takes a step with each kind of base and LoRA, whole and sharded, and writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from killed_runs import tiny  # has the extension imported
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import KINDS
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.model_config import ModelConfig
from qwen_edit_lora.lora_core.training.model.sharding import choose_sharding

CASES = {
    **{storage: (storage, LoraSettings(rank=4)) for storage in ("bf16", "fp8", "int8", "nf4")},
    "dora": ("fp8", LoraSettings(rank=4, use_dora=True)),
    "pissa": ("bf16", LoraSettings(rank=4, init="pissa")),
}


def take_step(path: str, storage: str, settings: LoraSettings, sharding, checkpointing: bool | str):
    model = load_transformer(path, storage, compute_dtype=torch.float32, sharding=sharding)
    model.enable_gradient_checkpointing(checkpointing)
    kept = sum(count_local_bytes(p) for p in model.blocks.parameters())
    injection = inject(model.transformer, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in injection.layers.values():
            layer.lora_B.normal_(std=0.02)
    for _ in range(2):
        out = model(
            torch.randn(1, 16, 7, 8),
            [torch.randn(1, 16, 6, 10)],
            torch.randn(1, 7, tiny.TEXT_WIDTH),
            None,
            torch.tensor([0.3]),
        )
        out.square().mean().backward()
    return kept, [out.detach(), *(p.grad for p in injection.parameters())]


def count_local_bytes(parameter: torch.Tensor) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.dtype.itemsize


def main(path: str, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    found = {}
    for name, (storage, settings) in CASES.items():
        for checkpointing in KINDS:
            sharding = choose_sharding(ModelConfig(source=path), accelerator)
            whole, expected = take_step(path, storage, settings, None, checkpointing)
            share, results = take_step(path, storage, settings, sharding, checkpointing)
            found[f"{name}, checkpointing {checkpointing}"] = {
                "share": share / whole,
                "equal": all(map(torch.equal, results, expected)),
            }
    text = json.dumps(found)
    (Path(folder) / f"{accelerator.process_index}.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
