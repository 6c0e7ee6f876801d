"""Cost of a trainable LoRA in one Qwen-Image block: PEFT's layers beside ours, in one process.

usage: .venv/bin/python benchmarks/injection.py [--alone] [--tokens 1024] [--rank 16] [--rounds 5]

One block of full width (3072, diffusers' own class), forward and backward to its inputs and to the
LoRA of all 12 Linears. The variants share the block's weights and are measured alternately, so that
each round gives ratios; their medians are reported. "base" has no LoRA and is the lower bound.
`--alone` leaves out the base's own products (they return zeros at once), to isolate the LoRAs'
cost. `--threads 1` on a CPU counts the process's own time, which other processes hardly change. On
a GPU the peak memory above the weights is reported too. `--quick` is only a smoke test.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="narrow block, few tokens")
    parser.add_argument("--tokens", type=int, default=1024, help="of the image stream")
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores, by the wall clock")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the base; cpu: float32"
    )
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without the base's products")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.text_tokens, options.rounds = 64, 16, 2
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def import_extension() -> None:
    """Imports by path, as ComfyUI does: our `nodes` must not shadow ComfyUI's."""
    spec = importlib.util.spec_from_file_location(
        "qwen_edit_lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def build_model(options: argparse.Namespace) -> Any:
    """The block as `transformer_blocks.0`, followed by one that keeps it from being inert."""
    import torch
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    heads, head_width = (2, 32) if options.quick else (24, 128)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        torch.set_default_dtype(dtype)
        block = QwenImageTransformerBlock(heads * head_width, heads, head_width)
        torch.set_default_dtype(torch.float32)
        last = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1)})})
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleDict({"0": block})})
    model.transformer_blocks["1"] = last
    return model.requires_grad_(False)


def share(model: Any) -> Any:
    """A copy of the module tree that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def build_variants(model: Any, options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Name -> (model, context it runs in)."""
    import peft
    import torch
    from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection
    from qwen_edit_lora.lora_core.injection.layers import LoraLinear

    settings = LoraSettings(rank=options.rank, exclude=("*.1.*",), use_dora=options.dora)
    plan = plan_injection(model, settings)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=[target.module_path for target in plan.targets],
        use_dora=options.dora,
    )

    class SeparateSum(LoraLinear):
        """Scales and adds the up-product as PEFT does, to show what `addmm_` saves."""

        def add_lora(self, out: Any, hidden: Any) -> Any:
            up = self.up.to(out.dtype)
            return out + torch.nn.functional.linear(hidden, up) * self.scale

    def inject_peft() -> Any:
        tree = peft.inject_adapter_in_model(config, share(model))
        for name, parameter in tree.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return tree

    def inject_ours(kind: type | None = None, share_inputs: bool = True) -> Any:
        tree = share(model)
        injection = inject(tree, plan, share_inputs=share_inputs)
        for layer in injection.layers.values():
            layer.__class__ = kind or layer.__class__
        return tree

    none = contextlib.nullcontext()
    variants = {
        "base": (share(model), none),
        "peft": (inject_peft(), none),
        "ours, not shared": (inject_ours(share_inputs=False), none),
        "ours": (inject_ours(), none),
    }
    if not options.dora:
        variants["ours, separate sum"] = (inject_ours(SeparateSum), none)
    if options.dtype == "bfloat16":  # as diffusers' scripts train: LoRA in float32, autocast
        autocast = torch.autocast(options.device, torch.bfloat16)
        variants["peft, autocast"] = (inject_peft(), autocast)
    if options.alone:
        for tree, _ in variants.values():
            leave_out_products(tree)
    return variants


def leave_out_products(tree: Any) -> None:
    """Makes the base's Linears return zeros; PEFT's lora_A and lora_B, also Linears, are kept."""
    import torch

    for name, module in tree.named_modules():
        if type(module) is torch.nn.Linear and "lora_" not in name:
            out = module.out_features
            module.forward = lambda x, out=out: x.new_zeros(*x.shape[:-1], out)


def build_step(model: Any, context: Any, options: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward; inputs require gradients, like those of a block inside a model."""
    import torch
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    block = model.transformer_blocks["0"]
    width, head_width = block.dim, block.attention_head_dim
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(**where)

    side = 8 if options.quick else 2 ** (options.tokens.bit_length() // 2)
    grid = (1, options.tokens // side, side)
    axes = [head_width // 8, head_width * 7 // 16, head_width * 7 // 16]
    rope = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
    frequencies = rope([grid], device=options.device, max_txt_seq_len=options.text_tokens)
    image = draw(1, grid[1] * grid[2], width).requires_grad_()
    text = draw(1, options.text_tokens, width).requires_grad_()
    time_embedding = draw(1, width)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with context:
            out_text, out_image = block(image, text, None, time_embedding, frequencies)
        torch.autograd.backward((out_text, out_image), (text.detach(), image.detach()))
        for tensor in (image, text, *parameters):
            tensor.grad = None
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def take(action: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    action()
    return clock() - start


def measure_peak(step: Callable[[], None]) -> int:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    options = parse_options()
    import_extension()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    alone = options.threads == 1 and options.device == "cpu"
    clock = time.process_time if alone else time.perf_counter
    model = build_model(options)
    variants = build_variants(model, options)
    steps = {name: build_step(*variant, options) for name, variant in variants.items()}
    for step in steps.values():
        step()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds):
        names = list(steps)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            times[name].append(take(steps[name], clock))

    def compare(name: str, other: str) -> float:
        pairs = zip(times[name], times[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 4)

    print(json.dumps(vars(options)))
    for name, measured in times.items():
        row = {
            "variant": name,
            "ms": round(statistics.median(measured) * 1e3, 2),
            "time / base": compare(name, "base"),
            "peft / time": compare("peft", name),
        }
        if options.device == "cuda":
            row["peak_mb"] = round(measure_peak(steps[name]) / 1e6, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
