"""Part A: the machine, and the rates that everything else is measured against."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .devices import free, read_host_memory, time_calls
from .extension import import_extension
from .records import read_records
from .settings import Context
from .traces import ATTENTION, find_kind, trace

#: Record names that other parts read.
PRODUCT_RATE = "bf16 product rate, square"
COPY_RATE = "copy on the device, read and written"

QUERY = "name,driver_version,memory.total,clocks.sm,power.limit,pcie.link.gen.current"
LIMITS = Path("/proc/self/limits")
PINNED_BYTES = 18_874_368  # a matrix of 3072 x 3072 in bf16
NUM_PINNED = 20
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def run(context: Context) -> None:
    record = context.record
    if not context.is_dry:
        record.must("PyTorch finds a card", torch.cuda.is_available(), torch.__version__)
    items = (note_versions, measure_products, measure_copies, look_at_attention)
    for item in (*items, compare_scales, look_at_norms, look_at_pinned_memory):
        with record.item(item.__name__):
            item(context)
            free(context.device)


def find_rate(context: Context, name: str) -> float | None:
    """A rate measured by part A, in its unit; None if it did not run."""
    found = [r.value for r in read_records(context.results) if r.part == "A" and r.name == name]
    return float(found[-1]) if found and isinstance(found[-1], int | float) else None


def note_versions(context: Context) -> None:
    record = context.record
    record.figure("torch", torch.__version__)
    record.figure("CPU threads", os.cpu_count() or 0)
    record.figure("free disk", shutil.disk_usage(context.folder).free / 1e9, "GB")
    if context.is_dry:
        return
    record.figure("cuDNN", str(torch.backends.cudnn.version()))
    properties = torch.cuda.get_device_properties(0)
    record.figure("memory of the card", properties.total_memory / 1e9, "GB")
    record.figure("multiprocessors", properties.multi_processor_count)
    free_bytes, _ = torch.cuda.mem_get_info()
    record.figure("free beside one context", free_bytes / 1e9, "GB")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        record.figure("nvidia-smi", found.stdout.strip())


def measure_products(context: Context) -> None:
    sizes = context.sizes
    square = 64 if context.is_dry else 8192
    shapes = {
        PRODUCT_RATE: (square, square, square),
        "bf16 product rate, MLP": (sizes.num_tokens, sizes.width, 4 * sizes.width),
        "bf16 product rate, attention's": (sizes.num_tokens, sizes.width, sizes.width),
    }
    for name, (rows, inner, columns) in shapes.items():
        a = torch.randn(rows, inner, device=context.device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=context.device, dtype=torch.bfloat16)
        seconds = time_calls(lambda a=a, b=b: functional.linear(a, b), context.device, 20)
        context.record.figure(name, 2 * rows * inner * columns / seconds / 1e12, "TFLOP/s")


def measure_copies(context: Context) -> None:
    size, device = 2**20 if context.is_dry else 2**30, context.device
    pageable = torch.ones(size, dtype=torch.uint8)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.ones(size, dtype=torch.uint8, device=device)

    def measure(name: str, function: Callable[[], object], counted: int) -> None:
        seconds = time_calls(function, device, 5)
        context.record.figure(name, counted / seconds / 1e9, "GB/s")

    measure(COPY_RATE, lambda: there.copy_(other), 2 * size)
    measure("copy to the device, pageable", lambda: there.copy_(pageable), size)
    if not context.is_dry:
        pinned = pageable.pin_memory()
        measure("copy to the device, pinned", lambda: there.copy_(pinned, non_blocking=True), size)


def look_at_attention(context: Context) -> None:
    """Which kernel PyTorch chooses for a joint sequence, and how long each takes."""
    sizes, device = context.sizes, context.device
    shape = (1, sizes.num_tokens, sizes.heads, sizes.head_width)
    # As the blocks make them: heads are a view of (batch, tokens, heads, width).
    query, key, value = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(1, 1, 1, sizes.num_tokens, dtype=torch.bool, device=device)
    mask[..., : sizes.text_tokens[0] // 2] = False

    def attend(attn_mask: torch.Tensor | None) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask)

    def attend_and_back(attn_mask: torch.Tensor | None) -> None:
        attend(attn_mask).sum().backward()

    for label, attn_mask in (("", None), (" with a mask", mask)):
        found = trace(lambda m=attn_mask: attend_and_back(m), device)
        names = [name for name, _ in found.kernels_s.most_common() if find_kind(name) == ATTENTION]
        named = "; ".join(name[:100] for name in names[:4])
        context.record.must(f"attention's kernels are named{label}", bool(names), named)
        for name, backend in ({} if context.is_dry else BACKENDS).items():
            measure_attention(
                *(context, f"{name}{label}", sdpa_kernel(backend)),
                *(lambda m=attn_mask: attend(m), lambda m=attn_mask: attend_and_back(m)),
            )
        measure_attention(
            *(context, f"as PyTorch chooses{label}", nullcontext()),
            *(lambda m=attn_mask: attend(m), lambda m=attn_mask: attend_and_back(m)),
        )


def measure_attention(
    context: Context,
    name: str,
    backend: object,
    forward: Callable[[], object],
    both: Callable[[], object],
) -> None:
    record = context.record
    try:
        with backend:  # type: ignore[attr-defined]
            with torch.no_grad():
                first = time_calls(forward, context.device, 5)
            whole = time_calls(both, context.device, 5)
    except RuntimeError as e:
        record.skip(f"attention, {name}", f"not for these inputs ({str(e).splitlines()[0][:120]})")
        return
    record.figure(f"attention forward, {name}", first * 1e3, "ms")
    record.figure(f"attention forward and backward, {name}", whole * 1e3, "ms")


def compare_scales(context: Context) -> None:
    """Whether a scaled fp8 weight is decoded on the GPU as on a CPU, where it is exact."""
    import_extension()
    from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight
    from qwen_edit_lora.lora_core.training.model.frozen_linear import build_scaled_linear

    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(256, 256, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0123456789)
    expected = (codes.float() * scale).bfloat16().float()

    def measure_error(found: torch.Tensor) -> float:
        return (
            ((found.float().cpu() - expected).abs() / expected.abs().clamp_min(1e-12)).max().item()
        )

    there = codes.to(context.device).bfloat16()
    for name, form in (("a number", ()), ("(1, 1)", (1, 1))):
        found = torch.mul(there, scale.reshape(form).to(context.device)).bfloat16()
        context.record.figure(f"error of a scale as {name}", measure_error(found))
    linear = build_scaled_linear(BaseWeight(codes, scale), None).to(context.device)
    error = measure_error(linear.dequantize(torch.bfloat16))
    context.record.must("scaled fp8 is decoded exactly", error == 0, error)


def look_at_norms(context: Context) -> None:
    sizes, device = context.sizes, context.device
    shape = (1, sizes.num_tokens, sizes.heads, sizes.head_width)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.ones(sizes.head_width, device=device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        return functional.rms_norm(x, (sizes.head_width,), gain, 1e-6)

    forward().sum().backward()
    context.record.figure("rms_norm, kernels forward", trace(forward, device).num_kernels)
    out = forward()
    grad = torch.ones_like(out)
    backward = trace(lambda: out.backward(grad), device)
    context.record.figure("rms_norm, kernels backward", backward.num_kernels)
    context.record.figure("rms_norm, forward", time_calls(forward, device) * 1e3, "ms")


def look_at_pinned_memory(context: Context) -> None:
    """Memory overhead of pinning 20 matrices one by one, beyond their size."""
    if context.is_dry:
        context.record.skip("pinned memory", "needs a card")
        return
    before = read_host_memory("VmRSS")
    kept = [torch.empty(PINNED_BYTES, dtype=torch.uint8).pin_memory() for _ in range(NUM_PINNED)]
    grown, held = read_host_memory("VmRSS") - before, NUM_PINNED * PINNED_BYTES
    context.record.figure("pinned one by one, resident / held", grown / held)
    if hasattr(torch.cuda, "host_memory_stats"):
        stats = {k: v for k, v in torch.cuda.host_memory_stats().items() if "bytes.current" in k}
        context.record.figure("pinned, allocator's bytes", str(stats))
    del kept
    lines = LIMITS.read_text().splitlines() if LIMITS.exists() else []
    locked = [" ".join(li.split()[3:]) for li in lines if li.startswith("Max locked memory")]
    context.record.figure("limit of locked memory", "".join(locked))
