"""Floating point operations of one training step, ours and a plain diffusers + PEFT loop's.

usage: .venv/bin/python benchmarks/train_operations.py [--blocks 2] [--side 32] [--text-tokens 64]

Counted by torch's FlopCounterMode on the device "meta", where nothing is computed: the figures are
the same on every machine, and tell what a step saves whatever else the machine does. There
attention is plain products, which selective checkpointing does not keep; with the fused kernels of
a real device it computes less than is counted here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from apply import import_extension

import_extension()

from qwen_edit_lora.lora_core.injection import LoraSettings, inject, plan_injection  # noqa: E402
from qwen_edit_lora.lora_core.training.architecture import Architecture  # noqa: E402
from qwen_edit_lora.lora_core.training.transformer import EditTransformer  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

META = torch.device("meta")
VARIANTS = {"ours": True, "ours, selective": "selective", "ours, no checkpointing": False}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--side", type=int, default=32, help="of the latents; a picture's / 8")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args()


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=META)


def build_plain(options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
    from peft import LoraConfig

    architecture = Architecture(num_layers=options.blocks)
    model = architecture.build_empty().requires_grad_(False)
    axes = list(architecture.axes_dims_rope)
    model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
    paths = [t.module_path for t in plan_injection(model, LoraSettings(rank=options.rank)).targets]
    with META:
        model.add_adapter(LoraConfig(r=options.rank, target_modules=paths, init_lora_weights=False))
    model.enable_gradient_checkpointing()
    model.train()
    half = options.side // 2
    return lambda: model(
        hidden_states=empty(1, 2 * half**2, 64),
        encoder_hidden_states=empty(1, options.text_tokens, 3584),
        timestep=empty(1),
        img_shapes=[[(1, half, half)] * 2],
        return_dict=False,
    )[0]


def build_ours(options: argparse.Namespace, checkpointing: bool | str) -> Callable:
    transformer = Architecture(num_layers=options.blocks).build_empty().requires_grad_(False)
    model = EditTransformer(transformer, torch.float32)
    inject(transformer, LoraSettings(rank=options.rank), device=META)
    model.enable_gradient_checkpointing(checkpointing)
    image = empty(1, 16, options.side, options.side)
    return lambda: model(image, [image], empty(1, options.text_tokens, 3584), None, empty(1))


def count(forward: Callable[[], torch.Tensor]) -> float:
    """In units of 10^12, of the forward and the backward pass."""
    with FlopCounterMode(display=False) as counter:
        forward().mean().backward()
    return counter.get_total_flops() / 1e12


def main() -> None:
    options = parse_options()
    print(json.dumps(vars(options)), flush=True)
    torch.is_autocast_enabled = lambda *device: False  # which "meta" has no answer to
    plain = count(build_plain(options))
    print(json.dumps({"variant": "plain", "tera": round(plain, 3)}), flush=True)
    for name, checkpointing in VARIANTS.items():
        ours = count(build_ours(options, checkpointing))
        row = {"variant": name, "tera": round(ours, 3), "plain / it": round(plain / ours, 3)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
