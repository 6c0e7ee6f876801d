"""A tiny transformer, training sets and configurations, for tests and for processes they start.

The model is diffusers' own class with two blocks, called as the training engine calls models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.data.dataset import (
    CachedDataset,
    CachedItem,
    DatasetWriter,
    read_dataset,
)

TEXT_WIDTH = 64
HEADS = 2
HEAD_WIDTH = 32


class TinyModel(torch.nn.Module):
    """QwenImageTransformer2DModel behind the interface of `objective.VelocityModel`."""

    def __init__(self, seed: int = 0):
        from diffusers import QwenImageTransformer2DModel

        super().__init__()
        torch.manual_seed(seed)
        self.transformer = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 14, 14),
        )

    def forward(self, latents, references, text, text_mask, sigma):
        sizes = [tuple(image.shape[-2:]) for image in (latents, *references)]
        tokens = torch.cat([pack(image) for image in (latents, *references)], dim=1)
        shapes = [[(1, h // 2, w // 2) for h, w in sizes]] * len(latents)
        out = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=text_mask,
            timestep=sigma,
            img_shapes=shapes,
            return_dict=False,
        )[0]
        return unpack(out[:, : math.prod(shapes[0][0])], sizes[0])


def pack(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h * w // 4, c * 4)


def unpack(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    h, w = size
    b, _, c = tokens.shape
    x = tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, h, w)


def make_item(
    seed: int,
    target: tuple[int, int] = (8, 8),
    references: tuple[tuple[int, int], ...] = ((8, 8),),
    num_text_tokens: int = 5,
    **optional: torch.Tensor,
) -> CachedItem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return CachedItem(
        target=draw(16, *target),
        references=tuple(draw(16, *size) for size in references),
        text=draw(num_text_tokens, TEXT_WIDTH),
        **optional,
    )


def make_dataset(folder: Path, items: dict[str, CachedItem] | int = 3) -> CachedDataset:
    if isinstance(items, int):
        items = {f"item_{i}": make_item(i, num_text_tokens=4 + i) for i in range(items)}
    writer = DatasetWriter(folder)
    for key, item in items.items():
        writer.add(key, item)
    return read_dataset(writer.finish())


def make_config(folder: Path, **changes: Any):
    """Nested changes by dotted name: `make_config(tmp_path, **{"optimizer.accumulation": 2})`."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "run"),
        "steps": 6,
        "model": {"source": "tiny", "compute_dtype": "fp32", "device": "cpu"},
        "data": {"folder": str(folder / "data")},
        "lora": {"rank": 4, "targets": ["full"]},
        "optimizer": {"learning_rate": 1e-2},
        "saving": {"checkpoint_every": 2, "adapter_every": 0, "health_every": 0},
    }
    for name, value in changes.items():
        *sections, key = name.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return config_from_dict(values)


def make_injected(config, dtype: torch.dtype = torch.float32):
    model = TinyModel().to(dtype)
    injection = inject(model.transformer, config.lora, dtype=dtype, seed=config.seed)
    return model, injection
