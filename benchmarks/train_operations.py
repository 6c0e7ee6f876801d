"""Floating point operations of one training step, ours and a plain diffusers + PEFT loop's, and
the memory traffic and saved activations of one of our blocks.

usage: .venv/bin/python benchmarks/train_operations.py [--blocks 2] [--side 32] [--text-tokens 64]

Counted by torch's FlopCounterMode on the device "meta", where nothing is computed: the numbers are
the same on every machine, whatever its load. On "meta", attention is plain products, whose results
selective checkpointing keeps, as it keeps that of a real device's fused kernel.

Memory is counted on a CPU in bfloat16, on one block of smaller width: in units of a stream tensor
(all tokens, width) the numbers hold for any width. They are the increase from a second block. Norm
and rotation are computed by Triton's kernels where available, and by PyTorch's operations elsewhere
(Windows); torch.compile is not counted.
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

from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection  # noqa: E402
from qwen_edit_lora.lora_core.training.model import head_rotation  # noqa: E402
from qwen_edit_lora.lora_core.training.model.architecture import Architecture  # noqa: E402
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import LiveBytes  # noqa: E402
from qwen_edit_lora.lora_core.training.model.transformer import EditTransformer  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from traffic import Traffic, counting_as_on_cuda  # noqa: E402

META = torch.device("meta")
VARIANTS = {"ours": True, "ours, selective": "selective", "ours, no checkpointing": False}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--side", type=int, default=32, help="of the latents; an image's / 8")
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


HEADS, HEAD_WIDTH, TEXT_WIDTH = 6, 128, 64
NUM_TOKENS = 2 * 16**2 + 64


def build_small(num_blocks: int, zero_cond_t: bool, kind: bool | str) -> Callable:
    """A step of a model with random weights, whose memory is counted."""
    architecture = Architecture(
        num_layers=num_blocks,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=TEXT_WIDTH,
        zero_cond_t=zero_cond_t,
    )
    transformer = architecture.build_empty().to_empty(device="cpu").bfloat16()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02)
    model = EditTransformer(transformer.requires_grad_(False).eval())
    inject(transformer, LoraSettings(rank=4))
    model.enable_gradient_checkpointing(kind)
    image, text = torch.randn(1, 16, 32, 32), torch.randn(1, 64, TEXT_WIDTH)
    return lambda: model(image, [image], text, None, torch.tensor([0.5]))


def count_memory(zero_cond_t: bool, kind: bool | str, use_kernels: bool) -> dict[str, float]:
    """Stream tensors that one block reads and writes in a step, in how many kernels, and keeps."""
    found = []
    for num_blocks in (1, 2):
        forward = build_small(num_blocks, zero_cond_t, kind)
        forward()
        with Traffic() as moved, counting_as_on_cuda(moved, head_rotation, use_kernels):
            forward().float().square().mean().backward()
        with LiveBytes() as kept, counting_as_on_cuda(moved, head_rotation, use_kernels):
            out = forward()
        found.append((moved.moved_bytes, kept.live, moved.num_kernels))
        del out
    unit = NUM_TOKENS * HEADS * HEAD_WIDTH * 2
    moved_bytes, kept_bytes, num_kernels = (two - one for one, two in zip(*found, strict=True))
    tensors = {"moved": moved_bytes / unit, "kept": kept_bytes / unit}
    return {**{name: round(n, 1) for name, n in tensors.items()}, "kernels": num_kernels}


def count_sum_in_place(total, a, b, **options) -> int:
    (rows, inner), columns = a, b[1]
    return 2 * rows * inner * columns


def count(forward: Callable[[], torch.Tensor]) -> float:
    """FLOPs in units of 10^12, of the forward and backward pass together."""
    # PyTorch's counter knows only `addmm`, which does not add LoRAs or sums of gradients.
    formula = {torch.ops.aten.addmm_: count_sum_in_place}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        forward().mean().backward()
    return counter.get_total_flops() / 1e12


def main() -> None:
    options = parse_options()
    print(json.dumps(vars(options)), flush=True)
    for use_kernels in (True, False):
        for zero_cond_t in (False, True):
            for kind in (False, "selective", True):
                row = {"stream tensors": "Triton" if use_kernels else "PyTorch"}
                row |= {"2511": zero_cond_t, "checkpointing": kind}
                row |= count_memory(zero_cond_t, kind, use_kernels)
                print(json.dumps(row), flush=True)
    torch.is_autocast_enabled = lambda *device: False  # unsupported on "meta"
    plain = count(build_plain(options))
    print(json.dumps({"variant": "plain", "tera": round(plain, 3)}), flush=True)
    for name, checkpointing in VARIANTS.items():
        ours = count(build_ours(options, checkpointing))
        row = {"variant": name, "tera": round(ours, 3), "plain / it": round(plain / ours, 3)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
