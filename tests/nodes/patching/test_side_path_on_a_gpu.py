"""The side path on a fake GPU: operand devices, and how much memory is moved.

FakeTensorMode has CUDA tensors without CUDA; it tracks shapes, dtypes and devices, and refuses two
devices in one operation like a GPU. ComfyUI's casts run unchanged, since here the weights really
are on another device than x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.fake_gpu import PagedMemory, Traffic
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
)
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.comfy

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
TOKENS, WIDTH, RANK = 96, 512, 16
ATTENTION = "transformer_blocks.0.attn."
MLP = "transformer_blocks.0.img_mlp.net."
#: One stream of a block: module path -> (out, in) in units of the width.
STREAM = {
    **{f"{ATTENTION}to_{name}": (1, 1) for name in ("q", "k", "v", "out.0")},
    f"{MLP}0.proj": (4, 1),
    f"{MLP}2": (1, 4),
}
PLACEMENTS = (
    *("resident", "offloaded", "offloaded, streams"),
    *("paged", "paged, no room", "paged, no room, streams"),
)


class FakeStream:
    """A CUDA stream that only counts how often it was waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def wait_stream(self, other: Any) -> None:
        self.waits += 1

    def as_context(self, _: Any) -> FakeStream:
        return self

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class FakeCastBuffer:
    """Where aimdo loads weights without a page: a VRAMBuffer."""

    def size(self) -> int:
        return 0

    def get(self, size: int, offset: int) -> tuple:
        return self, torch.empty(size, dtype=torch.uint8, device=CUDA), size


@pytest.fixture
def fake_mode() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture(params=PLACEMENTS)
def place(
    request: pytest.FixtureRequest, comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Callable[[torch.nn.Module], Any]:
    """Puts a bank where ComfyUI would, and returns the PagedMemory or the streams behind it."""
    placement, management = request.param, comfyui.model_management
    memory = PagedMemory(has_room=placement == "paged")
    if placement.startswith("paged"):
        memory.install(monkeypatch, comfyui)
        monkeypatch.setattr(comfyui.ops.args, "disable_pinned_memory", True)
    streams = [FakeStream(), FakeStream()]
    monkeypatch.setattr(management, "NUM_STREAMS", 2 if placement.endswith("streams") else 0)
    if placement.endswith("streams"):
        buffer = FakeCastBuffer()
        monkeypatch.setattr(management, "get_aimdo_cast_buffer", lambda *_: buffer)
        monkeypatch.setattr(management, "LARGEST_AIMDO_CASTED_WEIGHT", (None, 0))
        monkeypatch.setattr(management, "LARGEST_CASTED_WEIGHT", (None, 0))
        monkeypatch.setitem(management.STREAMS, CUDA, streams)
        monkeypatch.setattr(management, "current_stream", lambda device: FakeStream())
        monkeypatch.setattr(management, "STREAM_CAST_BUFFERS", {})

    def put(bank: torch.nn.Module) -> Any:
        patcher = comfyui.model_patcher.CoreModelPatcher(bank, CUDA, CPU)
        if placement.startswith("paged"):
            patcher.load(CUDA)
        elif placement == "resident":
            for pack in bank.packs:  # Module.to cannot replace a FakeTensor
                pack.weight = torch.nn.Parameter(pack.weight.to(CUDA), requires_grad=False)
        return SimpleNamespace(name=placement, memory=memory, streams=streams, patcher=patcher)

    return put


def build_adapter(kind: str) -> Adapter:
    """Every module of a stream with weights of one kind, and a bias."""

    def build(out: int, columns: int) -> Any:
        rows, bias = out * WIDTH, torch.randn(out * WIDTH)
        width = columns * WIDTH
        if kind == "LoRA":
            return LoraWeights(torch.randn(RANK, width), torch.randn(rows, RANK), 8.0, bias)
        if kind == "LoHa":
            factors = (torch.randn(rows, 4), torch.randn(4, width)) * 2
            return LohaWeights(*factors, bias_delta=bias)
        if kind == "LoKr":
            return LokrWeights(w1=torch.randn(4, 8), w2=torch.randn(rows // 4, width // 8))
        return DiffWeights(torch.randn(rows, width), bias)

    return Adapter({path: build(*shape) for path, shape in STREAM.items()}, name=kind)


def build_bank(*adapters: Adapter) -> Any:
    from qwen_edit_lora.nodes.patching.bank import Bank
    from qwen_edit_lora.nodes.patching.layouts import PLAIN

    return Bank([(a, frozenset(a), PLAIN) for a in adapters], torch.bfloat16)


def run_stream(bank: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """Runs the sites of a stream as in one block."""
    shared = torch.empty(1, TOKENS, WIDTH, dtype=dtype, device=CUDA)
    for path, (out, columns) in STREAM.items():
        reads_shared = path.endswith(("to_q", "to_k", "to_v"))
        x = torch.empty(1, TOKENS, columns * WIDTH, dtype=dtype, device=CUDA)
        y = torch.empty(1, TOKENS, out * WIDTH, dtype=dtype, device=CUDA)
        site = bank.sites[path]
        gains = tuple(0.5 + index for index in range(len(site.members)))
        result = site.add(y, shared if reads_shared else x, gains)
        assert result.device == CUDA
        assert result.shape == y.shape
        assert result.dtype == dtype


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_every_kind_runs_on_the_gpu_wherever_its_weights_are(kind, fake_mode, ours, place):
    bank = build_bank(build_adapter(kind), build_adapter("LoRA"))
    placed = place(bank)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
            run_stream(bank, dtype)
    assert placed.memory.pinned == 0


def test_a_site_is_one_fetch_wherever_its_weights_are(fake_mode, ours, place):
    bank = build_bank(build_adapter("LoRA"), build_adapter("LoKr"))
    placed = place(bank)
    with torch.inference_mode():
        run_stream(bank)
        placed.memory.faults.clear()
        placed.streams[0].waits = placed.streams[1].waits = 0
        run_stream(bank)
    if placed.name.startswith("paged"):
        assert len(placed.memory.faults) == len(STREAM)
        assert len({id(page) for page in placed.memory.faults}) == len(STREAM)
        assert placed.memory.pinned == 0
    if placed.name == "offloaded, streams":
        # Once before the copy, and once after the last product that reads the copy.
        assert sum(stream.waits for stream in placed.streams) == 2 * len(STREAM)


def test_a_stream_moves_25_tensors_of_its_size_wherever_the_weights_are(fake_mode, ours, place):
    """x is read, y is read and written: 1 + 2 * 3 for q, k and v, 1 + 2, 1 + 2 * 4, 4 + 2."""
    bank = build_bank(build_adapter_of_plain_loras())
    place(bank)
    with torch.inference_mode():
        run_stream(bank)
        with Traffic(TOKENS) as traffic:
            run_stream(bank)
    assert traffic.count(WIDTH) == 25
    products = [name for name in traffic.operations if name in ("aten::linear", "aten::addmm_")]
    assert len(products) == 4 + 6


def build_adapter_of_plain_loras() -> Adapter:
    plain = build_adapter("LoRA")
    return replace(
        plain,
        modules={
            path: LoraWeights(w.lora_A, w.lora_B, w.alpha) for path, w in plain.modules.items()
        },
    )


def test_weights_left_on_the_wrong_device_are_detected(fake_mode, ours, monkeypatch):
    """These tests would fail without ComfyUI's cast."""
    bank = build_bank(build_adapter("LoRA"))
    monkeypatch.setattr(ours.host.PackedWeights, "fetch", lambda self, x: (self.weight, None))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"two (different )?devices"):
        run_stream(bank)
