"""Codes are decoded identically on every device, and how many bytes that moves."""

from __future__ import annotations

import copy

import pytest
import torch
from counted_bytes import ByteCount
from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight, rotate
from qwen_edit_lora.lora_core.training.model.frozen_linear import (
    build_rotation,
    build_scaled_linear,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GROUP = 64
ROWS, COLUMNS = 96, 128
CUDA = torch.device("cuda:0")


def make_weight(kind: str) -> BaseWeight:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, COLUMNS, generator=generator)
    if kind == "mxfp8":
        exponents = torch.randint(-9, -4, (ROWS, COLUMNS // 32), generator=generator)
        return BaseWeight((values * 40).to(torch.float8_e4m3fn), torch.exp2(exponents.float()))
    if kind.startswith("fp8"):
        codes = (values * 100).to(torch.float8_e4m3fn)
        scale = torch.rand(ROWS, 1, generator=generator) * 1e-3
        return BaseWeight(codes, scale if kind == "fp8 by row" else torch.tensor(1.2345e-4))
    if kind == "rotated int8":
        values = rotate(values, GROUP)
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    if kind == "int8":
        scale = scale.max()
    rotation = GROUP if kind == "rotated int8" else 0
    return BaseWeight((values / scale).round().to(torch.int8), scale, rotation)


KINDS = ("fp8", "fp8 by row", "int8", "int8 by row", "rotated int8", "mxfp8")


class WatchedProducts(TorchDispatchMode):
    """Records dimensions and dtypes of the factors multiplied into weights."""

    def __init__(self):
        super().__init__()
        self.factors: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function._schema.name in ("aten::mul", "aten::mul_"):
            self.factors.append((arguments[1].ndim, arguments[1].dtype))
        return function(*arguments, **(options or {}))


def pretend(linear, mode):
    """The same on a fake GPU."""
    linear = copy.deepcopy(linear)
    for name, tensor in (*linear.named_parameters(), *linear.named_buffers()):
        fake = mode.from_tensor(tensor.data)
        with mode:
            fake = fake.to(CUDA)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(linear, name, torch.nn.Parameter(fake, False) if is_parameter else fake)
    return linear


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_applied_in_float32_on_every_device(kind):
    # A GPU's kernel takes a tensor without dimensions for a number of the other one's type, and
    # loads it rounded to that (torch's Loops.cuh, opmath_symmetric_gpu_kernel_with_scalars).
    mode = FakeTensorMode()
    linear = pretend(build_scaled_linear(make_weight(kind), None), mode)
    assert linear.scale.ndim == 2
    assert linear.scale.dtype == torch.float32
    with mode, WatchedProducts() as watched:
        values = linear.decode(torch.bfloat16, *linear.codes)
    assert values.dtype == torch.bfloat16
    assert values.device == CUDA
    (factor,) = watched.factors
    assert factor[0] >= 2
    assert factor[1] == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_its_scale_is_rounded_once(kind, dtype):
    weight = make_weight(kind)
    linear = build_scaled_linear(weight, None)
    unturned = BaseWeight(weight.stored, weight.scale).values
    assert torch.equal(linear.decode(dtype, *linear.codes), unturned.to(dtype))


def test_the_order_of_operations_for_a_gpu_gives_the_same_bits():
    # The GPU's decoding code, run here: out= with its own dtypes, and (1, 1) for one scale.
    for kind in KINDS:
        weight = make_weight(kind)
        expected = BaseWeight(weight.stored, weight.scale).values.bfloat16()
        codes, scale = weight.stored, torch.as_tensor(weight.scale)
        source = codes if codes.dtype == torch.int8 else codes.bfloat16()
        out = torch.empty(codes.shape, dtype=torch.bfloat16)
        if weight.scaling == "block":
            blocks = [x.unflatten(1, (-1, 32)) for x in (source, out)]
            torch.mul(blocks[0], scale[..., None], out=blocks[1])
        else:
            torch.mul(source, scale.reshape(-1, 1), out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("fp8", 7), ("fp8 by row", 7), ("int8", 3), ("int8 by row", 3), ("mxfp8", 7.2)],
)
def test_decoding_on_a_gpu_moves_few_bytes_per_weight(kind, limit):
    mode = FakeTensorMode()
    linear = pretend(build_scaled_linear(make_weight(kind), None), mode)
    with mode, ByteCount() as moved:
        linear.decode(torch.bfloat16, *linear.codes)
    scales = linear.scale.numel() * 4
    assert moved.num_bytes <= limit * ROWS * COLUMNS + scales


def test_rotated_codes_are_not_turned_back_for_a_product():
    mode = FakeTensorMode()
    bias = torch.randn(ROWS).bfloat16()
    linear = pretend(build_scaled_linear(make_weight("rotated int8"), bias), mode)
    with mode:
        x = torch.randn(5, 7, COLUMNS, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        with ByteCount() as moved:
            linear(x)  # a backward pass does not run without the GPU
    # Decoded, and read by the product: 5 bytes a weight, where turning it back took about 100.
    # Beside that x is turned: read, written and read again, and the matrix.
    out, matrix = 35 * ROWS * 2, GROUP**2 * 2
    assert moved.num_bytes <= 5 * ROWS * COLUMNS + 3 * 35 * COLUMNS * 2 + out + matrix + 6 * ROWS


def compute_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 0.004)], ids=str
)
@pytest.mark.parametrize("num_bias", [0, ROWS])
def test_a_rotated_linear_computes_with_the_weight_that_it_stands_for(num_bias, dtype, limit):
    torch.manual_seed(1)
    weight = make_weight("rotated int8")
    bias = torch.randn(num_bias).to(dtype) if num_bias else None
    linear = build_scaled_linear(weight, bias)
    exact = rotate(weight.stored.double() * weight.scale.double(), GROUP)
    x = torch.randn(3, 40, COLUMNS).to(dtype).requires_grad_()
    seed = torch.randn(3, 40, ROWS).to(dtype)
    out = linear(x)
    out.backward(seed)
    expected = x.detach().double() @ exact.T
    if bias is not None:
        expected = expected + bias.double()
    assert compute_error(out, expected) < limit
    assert compute_error(x.grad, seed.double() @ exact) < limit
    with torch.no_grad():
        assert torch.equal(linear(x), out)


def test_a_rotated_linear_returns_its_true_weight():
    weight = make_weight("rotated int8")
    linear = build_scaled_linear(weight, None)
    assert torch.equal(linear.dequantize(), weight.values)
    assert torch.equal(linear.dequantize(torch.bfloat16), weight.values.bfloat16())
    assert not torch.equal(linear.decode(torch.float32, *linear.codes), weight.values)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_a_rotations_matrix_is_exact_in_bf16_symmetric_and_its_own_inverse(group):
    matrix = build_rotation(group, torch.device("cpu"))
    assert torch.equal(matrix.float(), rotate(torch.eye(group), group))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.float() @ matrix.float(), torch.eye(group))


def test_a_rotated_linear_compiles_into_one_graph():
    linear = build_scaled_linear(make_weight("rotated int8"), torch.randn(ROWS))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, other = (torch.ones(3, COLUMNS, requires_grad=True) for _ in range(2))
    out, expected = compiled(x), linear(other)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
