"""Which kernel computes attention, and what is kept of it for the backward pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from qwen_edit_lora.lora_core.training.model.attention import (
    FAST_CUDNN,
    attend,
    attend_keeping_result,
    choose_kernels,
    order_kernels,
)
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
SHAPE = (2, 7, 3, 8)


def make_gpu(monkeypatch, capability, cudnn=FAST_CUDNN + 1, hip=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("gpu", "order"),
    [
        ({"capability": (8, 6)}, (FLASH, CUDNN, EFFICIENT, MATH)),
        ({"capability": (8, 9)}, (FLASH, CUDNN, EFFICIENT, MATH)),
        ({"capability": (12, 0)}, (FLASH, CUDNN, EFFICIENT, MATH)),
        ({"capability": (9, 0)}, (CUDNN, FLASH, EFFICIENT, MATH)),
        ({"capability": (10, 0)}, (CUDNN, FLASH, EFFICIENT, MATH)),
        ({"capability": (9, 0), "cudnn": FAST_CUDNN}, (FLASH, CUDNN, EFFICIENT, MATH)),
        ({"capability": (9, 0), "cudnn": None}, (FLASH, CUDNN, EFFICIENT, MATH)),
        ({"capability": (9, 4), "hip": "7.2"}, ()),
    ],
    ids=["3060", "4090", "5090", "H100", "B200", "old cuDNN", "no cuDNN", "ROCm"],
)
def test_the_fastest_kernel_of_a_gpu_is_tried_first(gpu, order, monkeypatch):
    make_gpu(monkeypatch, **gpu)
    assert order_kernels.__wrapped__(torch.device("cuda:0"), False) == order


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_deterministic_algorithms_never_use_cudnn(capability, monkeypatch):
    make_gpu(monkeypatch, capability)
    order = order_kernels.__wrapped__(torch.device("cuda:0"), True)
    assert order == (FLASH, EFFICIENT, MATH)


def test_the_kernel_order_applies_inside_and_is_restored(monkeypatch):
    make_gpu(monkeypatch, (9, 0))
    order_kernels.cache_clear()
    read = torch._C._get_sdp_priority_order
    before, was_on = read(), torch.backends.cuda.cudnn_sdp_enabled()
    with choose_kernels(torch.device("cuda:0")):
        assert read()[:4] == [int(kernel) for kernel in (CUDNN, FLASH, EFFICIENT, MATH)]
    assert read() == before
    torch.use_deterministic_algorithms(True)
    try:
        with choose_kernels(torch.device("cuda:0")):
            assert read()[:3] == [int(kernel) for kernel in (FLASH, EFFICIENT, MATH)]
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        order_kernels.cache_clear()
    assert torch.backends.cuda.cudnn_sdp_enabled() == was_on


def test_a_cpu_keeps_its_own_kernel_choice():
    before = torch._C._get_sdp_priority_order()
    with choose_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(name in one and "backward" not in one for one in self.names)


class Preparation:
    """Combines three parts to q, k and v, and counts its calls."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, a, b, c):
        self.num_calls += 1
        return torch.cat([a, b], dim=1), a.sin().repeat(1, 2, 1, 1), torch.cat([c, c], dim=1) * 2


def draw_parts(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=dtype).requires_grad_() for _ in range(3)]


def draw_mask():
    mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)
    mask[1, ..., :5] = False
    return mask


@pytest.mark.parametrize("mask", [None, draw_mask()], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeping_the_result_changes_no_bit_and_recomputes_no_attention(dtype, mask):
    found = []
    for function in (lambda p, parts, m: attend(*p(*parts), m), attend_keeping_result):
        parts, prepare = draw_parts(dtype), Preparation()
        with Calls() as calls:
            out = function(prepare, parts, mask)
            out.float().square().sum().backward()
        assert calls.count("scaled_dot_product") == 1
        found.append(([out.detach(), *(part.grad for part in parts)], prepare.num_calls))
    (expected, once), (kept, twice) = found
    assert (once, twice) == (1, 2)
    assert all(map(torch.equal, kept, expected))


def test_nothing_of_what_is_prepared_is_kept():
    references = []

    def prepare(*parts):
        heads = Preparation()(*parts)
        references.extend(weakref.ref(head.untyped_storage()) for head in heads)
        return heads

    parts = draw_parts()
    out = attend_keeping_result(prepare, parts, None)
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    out.sum().backward()
    gc.collect()
    assert [reference() for reference in references] == [None] * 6


def test_an_unused_result_leaves_nothing_behind():
    parts = draw_parts()
    out = attend_keeping_result(Preparation(), parts, None)
    reference = weakref.ref(out.untyped_storage())
    del out
    assert reference() is None  # no reference cycle that the garbage collector would have to find


def test_a_backward_pass_may_be_run_again():
    parts = draw_parts()
    prepare = Preparation()
    loss = attend_keeping_result(prepare, parts, None).square().sum()
    first, second = (torch.autograd.grad(loss, parts, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert prepare.num_calls == 3


def test_without_gradients_nothing_is_recomputed():
    prepare = Preparation()
    with torch.no_grad():
        out = attend_keeping_result(prepare, draw_parts(), None)
    assert not out.requires_grad
    assert prepare.num_calls == 1
