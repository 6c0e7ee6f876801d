"""A profiled piece of work as kernels: their kinds, how long the GPU was busy, what was copied.

Parsed from the trace that torch.profiler exports, whose categories are the same in every release.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .devices import synchronize

ATTENTION, ELEMENT_WISE, COPIES = "attention", "element-wise", "copies"
#: The first match in a kernel's name counts; names of attention kernels contain those of products.
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (ATTENTION, re.compile(r"flash|fmha|sdpa|attention|cudnn.*(fprop|bprop)", re.I)),
    ("decoding", re.compile(r"dequant|kDequantize", re.I)),
    ("products", re.compile(r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|addmm|::mm", re.I)),
)
KERNEL, COPY, SET, RUNTIME = "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime"


@dataclass
class Trace:
    """Times are in seconds."""

    wall_s: float = 0.0
    kinds_s: Counter[str] = field(default_factory=Counter)
    kernels_s: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0
    """During which any kernel or copy ran."""
    waiting_s: float = 0.0
    """That the host spent in calls that wait for the card."""
    num_kernels: int = 0
    copies: Counter[str] = field(default_factory=Counter)
    """Direction, such as "HtoD" -> number of copies."""


def find_kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), ELEMENT_WISE)


def trace(function: Callable[[], object], device: str) -> Trace:
    """Runs a function under the profiler; on a CPU its operators stand in for kernels."""
    on_card = device == "cuda"
    activity = torch.profiler.ProfilerActivity
    synchronize(device)
    with torch.profiler.profile(activities=[activity.CUDA if on_card else activity.CPU]) as profile:
        function()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return read_events(events, KERNEL if on_card else "cpu_op")


def read_events(events: list[dict], kernel: str = KERNEL) -> Trace:
    """Summarises the events of a trace that show what the GPU did."""
    found = Trace()
    spans = []
    edges = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name = event.get("cat", ""), event.get("name", "")
        start, seconds = float(event["ts"]) / 1e6, float(event.get("dur", 0)) / 1e6
        if category in (kernel, COPY, SET):
            spans.append((start, start + seconds))
            kind = find_kind(name) if category == kernel else COPIES
            found.kinds_s[kind] += seconds
            if category == kernel:
                found.num_kernels += 1
                found.kernels_s[name] += seconds
            if category == COPY:
                direction = re.search(r"(HtoD|DtoH|DtoD|HtoH|PtoP)", name)
                found.copies[direction[0] if direction else name] += 1
        elif category == RUNTIME:
            edges += [start, start + seconds]
            if "Synchronize" in name or name.startswith("cudaMemcpy"):
                found.waiting_s += seconds
    edges += [edge for span in spans for edge in span]
    found.wall_s = max(edges) - min(edges) if edges else 0.0
    found.busy_s = measure_union(spans)
    return found


def measure_union(spans: list[tuple[float, float]]) -> float:
    """Total length of the union of the intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
