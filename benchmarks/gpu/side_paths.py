"""Part G: the cost of a side path per call of the whole model, and of a new strength."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .comfyui_models import (
    Calls,
    apply,
    build_resident_model,
    call_model,
    count_swapped_forwards,
    measure_difference,
    start_comfyui,
)
from .settings import Context

OVERHEAD = "<= 8"  # percent of a call at 1 MP and rank 16
STREAM_TENSORS = "<= 25"  # per block, of (tokens, width) in bf16
STRENGTH_CHANGE = "< 1"  # ms
NUM_CHANGES = 20


def run(context: Context) -> None:
    start_comfyui(context.device, dynamic=False, keep_on_card=True)
    import torch

    from .bases import build_adapter

    sizes, record, device = context.sizes, context.record, context.device
    with torch.inference_mode():
        with record.item("model"):
            model = build_resident_model(sizes, sizes.blocks, device)
        low, high = sizes.ranks
        adapters = {
            low: build_adapter(sizes, sizes.blocks, low, device, 1),
            high: build_adapter(sizes, sizes.blocks, high, device, 2),
        }
        stacked = [
            (build_adapter(sizes, sizes.blocks, low, device, seed, alpha=low * scale), 0.5)
            for seed, scale in ((3, 0.5), (4, 1.0), (5, 2.0))
        ]
        ways = {
            f"r{low}": ((adapters[low], 0.7),),
            f"r{high}": ((adapters[high], 0.7),),
            f"3 x r{low}": tuple(stacked),
        }
        for side, label in ((sizes.side, "1 MP"), (sizes.small_side, "512 x 512")):
            with record.item(label):
                measure_calls(context, model, ways, side, label)
        with record.item("strength change"):
            measure_changes(context, model, adapters[low])
        with record.item("merge"):
            measure_merge(context, model)
        left = count_swapped_forwards(model)
        record.must("no forward is left behind", left == 0, left)


def measure_calls(context: Context, model: Any, ways: dict[str, Any], side: int, label: str):
    """Measures the base before and after each way, so that a GPU warming up affects both."""
    record, calls = context.record, context.sizes.calls
    base = call_model(model, context, side, calls)
    record.figure(f"{label}, base", base.median_s * 1e3, "ms")
    for number, (way, layers) in enumerate(ways.items()):
        patched = apply(model, *layers)
        found = call_model(patched, context, side, calls, keep=False)
        base_s = measure_base(context, model, side)
        is_first = number == 0 and side == context.sizes.side
        note_overhead(context, f"{label}, {way}", found, base_s, side, is_first)
        if number == 0:
            with fetched_each_time():
                slow = call_model(patched, context, side, calls, keep=False)
            name = f"{label}, {way}, weights fetched each time"
            note_overhead(context, name, slow, base_s, side, False)
    again = call_model(model, context, side, calls)
    equal = measure_difference(again.predictions, base.predictions) == 0
    record.must(f"{label}, the base is bit-equal afterwards", equal)


def measure_base(context: Context, model: Any, side: int) -> float:
    return call_model(model, context, side, context.sizes.calls, keep=False).median_s


def note_overhead(
    context: Context, name: str, found: Calls, base_s: float, side: int, is_aimed_at: bool
) -> None:
    """In percent of a call, and in bytes at the GPU's copy rate as stream tensors per block."""
    from .facts import COPY_RATE, find_rate

    record, sizes = context.record, context.sizes
    beside = found.median_s - base_s

    def note(what: str, value: float, unit: str, limit: str) -> None:
        if is_aimed_at:
            record.goal(f"{name}, {what}", value, unit, limit)
        else:
            record.figure(f"{name}, {what}", value, unit)

    record.figure(name, found.median_s * 1e3, "ms")
    note("overhead", beside / base_s * 100, "%", OVERHEAD)
    rate = find_rate(context, COPY_RATE)
    if rate is None:
        record.skip(f"{name}, stream tensors", "part A measured no copy rate")
        return
    tokens = 2 * (side // 2) ** 2 + sizes.text_tokens[-1]
    stream_bytes = tokens * sizes.width * 2
    count = beside * rate * 1e9 / (sizes.blocks * stream_bytes)
    note("stream tensors a block", count, "", STREAM_TENSORS)


@contextmanager
def fetched_each_time() -> Iterator[None]:
    """Makes ComfyUI's cast fetch the bank's weights each time, as when it pages them."""
    import comfy.ops
    from qwen_edit_lora.nodes.host.weights import PackedWeights

    def fetch(self: Any, like: Any) -> tuple[Any, Any]:
        ticket = comfy.ops.cast_bias_weight(self, like, offloadable=True)
        return ticket[0], ticket

    original = PackedWeights.fetch
    PackedWeights.fetch = fetch
    try:
        yield
    finally:
        PackedWeights.fetch = original


def measure_changes(context: Context, model: Any, adapter: Any) -> None:
    """A new strength: Apply, and a sampler's preparation before its first step."""
    import comfy.model_management as management
    from qwen_edit_lora.nodes.patching import side_path

    from .devices import synchronize

    record = context.record

    def load(patched: Any) -> None:
        side_path.prepare_side_path(
            lambda m: management.load_models_gpu([m, *m.get_nested_additional_models()]), patched
        )

    load(apply(model, (adapter, 0.3)))  # fetches the LoRA, as on both sides
    nodes, loads, plans = [], [], []
    for number in range(NUM_CHANGES):
        synchronize(context.device)
        started = time.perf_counter()
        patched = apply(model, (adapter, 0.4 + number / 100))
        nodes.append(time.perf_counter() - started)
        load(patched)
        synchronize(context.device)
        loads.append(time.perf_counter() - started)
        started = time.perf_counter()
        side_path.get_side_path(patched).get_plan(model.model.diffusion_model)
        plans.append(time.perf_counter() - started)
    record.figure("strength change, the node", statistics.median(nodes) * 1e3, "ms")
    whole = statistics.median(loads) * 1e3
    record.goal("strength change, node and sampler", whole, "ms", STRENGTH_CHANGE)
    record.figure("strength change, in the first call", statistics.median(plans) * 1e3, "ms")


def measure_merge(context: Context, model: Any) -> None:
    """ComfyUI's own patching of as many blocks as there is room to copy."""
    import comfy.model_management as management

    from .bases import build_adapter
    from .devices import take_time

    sizes, record, blocks = context.sizes, context.record, context.sizes.few_blocks
    adapter = build_adapter(sizes, blocks, sizes.ranks[0], context.device, 6)
    seconds = []
    for number in range(3):
        management.load_models_gpu([model])
        merged = apply(model, (adapter, 0.5 + number / 100), mode="merge")
        seconds.append(take_time(lambda m=merged: management.load_models_gpu([m]), context.device))
    management.load_models_gpu([model])
    whole = statistics.median(seconds) * sizes.blocks / blocks * 1e3
    text = f"{blocks} of {sizes.blocks} blocks were merged, times {sizes.blocks / blocks:g}"
    record.figure("a new strength by ComfyUI's merge", whole, "ms", text)
