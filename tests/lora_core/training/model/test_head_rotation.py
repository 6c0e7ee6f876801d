"""Norm and rotation of q and k: correct, as exact as before, and only the input is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core.training.model import head_rotation
from qwen_edit_lora.lora_core.training.model.head_rotation import (
    NormalizedRotation,
    find_kernels,
    normalize,
    normalize_and_rotate,
)
from qwen_edit_lora.lora_core.training.model.rope import compute_rotation, rotate

AXES, GRIDS, TEXT_TOKENS = (16, 56, 56), ((2, 3), (1, 2)), 5
IMAGE_TOKENS = 8
HEADS, WIDTH, EPS = 3, 128, 1e-6
KERNEL_CHECK = Path(__file__).parents[1] / "rotation_kernel_check.py"


def draw_inputs(dtype: torch.dtype = torch.float64, batch: int = 2):
    torch.manual_seed(0)
    text, image = (
        torch.randn(batch, n, HEADS, WIDTH, dtype=torch.float64)
        for n in (TEXT_TOKENS, IMAGE_TOKENS)
    )
    weights = (1 + torch.randn(2, WIDTH, dtype=torch.float64) / 4).unbind()
    inputs = tuple(t.to(dtype) for t in (text, image, *weights))
    rotation = compute_rotation(AXES, GRIDS, TEXT_TOKENS, dtype, torch.device("cpu"))
    return inputs, rotation


def compute_exactly(text, image, text_weight, image_weight, rotation):
    """x / rms(x) * weight as complex numbers rotated by their angles, in float64."""
    parts = []
    for x, weight in ((text, text_weight), (image, image_weight)):
        x = x.double()
        parts.append(x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double())
    x = torch.view_as_complex(torch.cat(parts, dim=1).unflatten(-1, (-1, 2)))
    cos, sin = (part.double()[:, 1::2] for part in rotation)
    return torch.view_as_real(x * torch.complex(cos, sin)[:, None]).flatten(-2)


def compute_as_before(text, image, text_weight, image_weight, rotation):
    """With diffusers' norm and products of halves, as before the two were fused."""
    parts = []
    for x, weight in ((text, text_weight), (image, image_weight)):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        parts.append((x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight)
    real, imaginary = torch.cat(parts, dim=1).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part[:, None, 1::2] for part in rotation)
    turned = (
        torch.addcmul(real * cos, imaginary, sin, value=-1),
        torch.addcmul(imaginary * cos, real, sin),
    )
    return torch.stack(turned, dim=-1).flatten(-2)


def compute(text, image, text_weight, image_weight, rotation):
    return normalize_and_rotate(text, image, text_weight, image_weight, rotation, EPS)


def compute_all(function, inputs, rotation, dtype):
    """The result and the gradients of text and image."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs[:2]]
    out = function(*leaves, *(weight.to(dtype) for weight in inputs[2:]), rotation)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).bfloat16().to(dtype))
    return [out.detach().double(), *(x.grad.double() for x in leaves)]


def test_the_result_and_its_gradients_are_those_of_complex_numbers():
    inputs, rotation = draw_inputs()
    found = compute_all(compute, inputs, rotation, torch.float64)
    expected = compute_all(compute_exactly, inputs, rotation, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_finite_differences(wanted):
    inputs, rotation = draw_inputs(batch=1)
    inputs = [x[..., :16].contiguous() for x in inputs]
    rotation = tuple(part[:, :16] for part in rotation)
    for x, is_wanted in zip(inputs, wanted, strict=False):
        x.requires_grad_(is_wanted)
    assert torch.autograd.gradcheck(compute, (*inputs, rotation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_larger_than_it_was(dtype):
    inputs, rotation = draw_inputs(dtype)
    wide = [x.double() for x in inputs]
    exact = compute_all(compute_exactly, wide, [part.double() for part in rotation], torch.float64)
    errors = [
        [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        for found in (
            compute_all(compute, inputs, rotation, dtype),
            compute_all(compute_as_before, inputs, rotation, dtype),
        )
    ]
    for new, old in zip(*errors, strict=True):
        assert new <= 1.02 * old


def test_the_forward_pass_of_the_rotation_alone_has_the_bits_it_had():
    inputs, rotation = draw_inputs(torch.bfloat16)
    text, image, *weights = inputs
    normalized = [normalize(text, weights[0], EPS), normalize(image, weights[1], EPS)]
    x = torch.cat(normalized, dim=1)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part[:, None, 1::2] for part in rotation)
    turned = (
        torch.addcmul(real * cos, imaginary, sin, value=-1),
        torch.addcmul(imaginary * cos, real, sin),
    )
    expected = torch.stack(turned, dim=-1).flatten(-2)
    assert torch.equal(rotate(x, rotation), expected)
    assert torch.equal(compute(*inputs, rotation), expected)


def test_nothing_but_the_inputs_is_kept():
    inputs, rotation = draw_inputs(torch.bfloat16)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    given = {t.data_ptr() for t in (*leaves, *inputs[2:], *rotation)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compute(*inputs, rotation)
    assert saved
    assert {t.data_ptr() for t in saved} <= given


def test_weights_of_another_dtype_are_read_in_that_of_the_stream():
    inputs, rotation = draw_inputs(torch.bfloat16)
    wide = [weight.float() for weight in inputs[2:]]
    out = compute(*inputs[:2], *wide, rotation)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, compute(*inputs, rotation))


def run_kernel_check(*arguments: str, **environment: str) -> dict:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(KERNEL_CHECK), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_compute_the_same():
    """Runs in Triton's interpreter, which needs no GPU."""
    found = run_kernel_check("interpret", TRITON_INTERPRET="1")
    assert found["float32"] < 1e-6
    # From bfloat16 to float32: exact except for the interpreter's own rounding, which truncates.
    assert found["bfloat16, wide"] < 1e-6
    assert found["compared"] < head_rotation.ROUNDING


def test_the_kernels_compile_for_nvidia_gpus():
    """For Ampere, Hopper and consumer Blackwell; what they read and write is 16 bytes at a time."""
    found = run_kernel_check("compile", TRITON_INTERPRET="0")
    assert len(found) == 12
    for name, instructions in found.items():
        wide = [i for i in instructions if i.endswith(".v4.b32")]
        assert {i.split(".")[0] for i in wide} == {"ld", "st"}, name


class Wrong:
    """Kernels that are off by a little, or fail."""

    def __init__(self, factor: float | None):
        self.factor = factor

    def write_rotated(self, *inputs):
        if self.factor is None:
            raise RuntimeError("no C compiler")
        head_rotation.OPERATIONS.write_rotated(*inputs)
        inputs[-1].mul_(self.factor)

    def compute_gradient(self, *inputs):
        return head_rotation.OPERATIONS.compute_gradient(*inputs)


@pytest.mark.parametrize(("factor", "is_used"), [(1.0, True), (1.1, False), (None, False)])
def test_kernels_are_used_only_where_verified(factor, is_used, monkeypatch):
    from qwen_edit_lora.lora_core.training import model

    kernels = Wrong(factor)
    monkeypatch.setattr(model, "rotation_kernel", kernels, raising=False)
    monkeypatch.setitem(sys.modules, f"{model.__name__}.rotation_kernel", kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    find_kernels.cache_clear()
    try:
        with torch.inference_mode():  # a sample image may come first
            found = find_kernels(torch.device("cpu"))
    finally:
        find_kernels.cache_clear()
    assert found is (kernels if is_used else None)


def test_old_gpus_get_pytorchs_operations(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert find_kernels.__wrapped__(torch.device("cpu")) is None


def test_kernels_where_they_are_used_serve_both_passes(monkeypatch):
    calls = []

    class Watched:
        @staticmethod
        def write_rotated(*inputs):
            calls.append("forward")
            head_rotation.OPERATIONS.write_rotated(*inputs)

        @staticmethod
        def compute_gradient(*inputs):
            calls.append("backward")
            return head_rotation.OPERATIONS.compute_gradient(*inputs)

    monkeypatch.setattr(head_rotation, "choose_steps", lambda x: Watched)
    inputs, rotation = draw_inputs()
    for x in inputs[:2]:
        x.requires_grad_()
    NormalizedRotation.apply(*inputs, *rotation, EPS).sum().backward()
    assert calls == ["forward"] * 2 + ["backward"] * 2
