"""Linears that read one tensor, as one autograd function: the results of each on its own."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight
from qwen_edit_lora.lora_core.injection.layers import DoraLinear, LoraLinear
from qwen_edit_lora.lora_core.training.model.frozen_linear import FrozenLinear, build_scaled_linear
from qwen_edit_lora.lora_core.training.model.lora_products import (
    begin_products,
    compute_products,
    finish_products,
    read_base,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

IN, OUTS = 10, (5, 4, 7)
SHAPE = (2, 4, IN)


def widen(dtype, codes, scale):
    return codes.to(dtype) * scale.to(dtype)


def make_base(out: int, kind: str = "plain", dtype: torch.dtype = torch.float64) -> nn.Module:
    if kind == "plain":
        return nn.Linear(IN, out, dtype=dtype).requires_grad_(False)
    codes = {"weight": torch.randint(-5, 6, (out, IN)).float(), "scale": torch.rand(out, 1)}
    bias = None if kind == "codes" else torch.randn(out, dtype=dtype)
    return FrozenLinear(out, IN, widen, codes, bias)


def make_lora(base: nn.Module, rank: int = 2, kind: type = LoraLinear, **more) -> LoraLinear:
    dtype = torch.float64 if base.weight.dtype == torch.float32 else base.weight.dtype
    down, up = torch.randn(rank, IN, dtype=dtype), torch.randn(base.out_features, rank, dtype=dtype)
    return kind(base, down / 4, up / 4, alpha=1.5 * rank, **more)


def make_group(kind: str) -> list[nn.Module]:
    torch.manual_seed(0)
    a, b, c = (make_base(out) for out in OUTS)
    if kind == "loras":
        return [make_lora(a, 2), make_lora(b, 3), make_lora(c, 1)]
    if kind == "one":
        return [make_lora(a)]
    if kind == "no lora":
        return [a, b]
    if kind == "some":
        return [a, make_lora(b), c]
    if kind == "codes":
        return [make_lora(make_base(4, "codes")), make_base(5, "codes and bias"), make_lora(a)]
    if kind == "pissa":
        parts = torch.randn(2, IN, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
        return [make_lora(a), make_lora(b, principal=parts)]
    if kind == "dora":
        return [make_lora(a, kind=DoraLinear), make_lora(b), make_lora(c, kind=DoraLinear)]
    if kind == "strength":
        group = [make_lora(a), make_lora(b), make_lora(c, kind=DoraLinear)]
        for layer, strength in zip(group, (0.0, 0.7, 0.0), strict=True):
            layer.strength = strength
        return group
    if kind == "watched":
        b.register_forward_hook(lambda module, inputs, out: 2 * out)
        return [make_lora(a), make_lora(b), c]
    raise ValueError(kind)


GROUPS = (*("loras", "one", "no lora", "some", "codes", "pissa", "dora", "strength", "watched"),)


def list_parameters(group):
    return [p for linear in group for p in linear.parameters() if p.requires_grad]


def compute_gradients(group, compute, x):
    parameters = list_parameters(group)
    loss = sum((out * (index + 1)).square().sum() for index, out in enumerate(compute(x)))
    return torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)


def compute_alone(group):
    return lambda x: [linear(x) for linear in group]


def compute_in_halves(group):
    return lambda x: finish_products(group, begin_products(group, x))


def compute_half_again(group):
    def compute(x):
        return finish_products(group, checkpoint(begin_products, group, x, use_reentrant=False))

    return compute


@pytest.mark.parametrize("name", GROUPS)
def test_results_and_gradients_are_those_of_each_linear_alone(name):
    group = make_group(name)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(compute_products(group, x), compute_alone(group)(x), strict=True):
        torch.testing.assert_close(found, expected)
    expected = compute_gradients(group, compute_alone(group), x)
    for compute in (lambda x: compute_products(group, x), compute_in_halves(group)):
        for a, b in zip(compute_gradients(group, compute, x), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", GROUPS)
def test_halves_give_the_bits_of_the_whole_and_so_does_a_half_computed_again(name):
    group = make_group(name)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    whole = compute_gradients(group, lambda x: compute_products(group, x), x)
    for compute in (compute_in_halves(group), compute_half_again(group)):
        assert all(map(torch.equal, compute_gradients(group, compute, x), whole))


@pytest.mark.parametrize("name", ["loras", "some", "codes", "pissa"])
@pytest.mark.parametrize("compute", [compute_products, lambda g, x: compute_in_halves(g)(x)])
def test_gradients_are_those_of_finite_differences(compute, name):
    group = make_group(name)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    parameters = list_parameters(group)
    assert torch.autograd.gradcheck(lambda x, *_: tuple(compute(group, x)), (x, *parameters))


@pytest.mark.parametrize("wanted", [(0,), (2,), (0, 2)])
def test_unused_results_cost_no_gradient(wanted):
    group = make_group("loras")
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def pick(compute):
        return lambda x: [compute(x)[index] for index in wanted]

    used = [group[index] for index in wanted]
    expected = compute_gradients(used, pick(compute_alone(group)), x)
    for compute in (lambda x: compute_products(group, x), compute_in_halves(group)):
        found = compute_gradients(used, pick(compute), x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_tensor_with_other_readers_gets_all_its_gradients():
    """The sum is written in place; tensors referenced elsewhere must not change."""
    group = make_group("loras")
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    held = []
    for compute in (compute_alone(group), compute_in_halves(group)):
        copied = x * 1
        copied.register_hook(held.append)
        loss = sum(out.square().sum() for out in compute(copied)) + (3 * copied).sin().sum()
        held.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(held[3], held[1])
    torch.testing.assert_close(held[2], held[0])


def test_dropout_draws_for_each_lora_what_it_would_draw_alone():
    torch.manual_seed(0)
    group = [make_lora(make_base(out), dropout=0.5) for out in OUTS]
    for layer in group:
        layer.train()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    found = []
    for compute in (compute_alone(group), lambda x: compute_products(group, x)):
        torch.manual_seed(1)
        found.append(compute_gradients(group, compute, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_strength_0_is_bit_identical_to_the_base():
    group = make_group("loras")
    for layer in group:
        layer.strength = 0.0
    x = torch.randn(SHAPE, dtype=torch.float64)
    for out, layer in zip(compute_products(group, x), group, strict=True):
        assert torch.equal(out, layer.base(x))


def test_without_gradients_nothing_is_kept():
    group = make_group("loras")
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        outs = compute_products(group, x)
    assert not any(out.requires_grad for out in outs)


class Recorded(TorchDispatchMode):
    """Names of operations and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.calls.append((func._schema.name.split("::")[1], tuple(out.shape)))
        return out


@pytest.mark.parametrize("compute", [compute_products, lambda g, x: compute_in_halves(g)(x)])
def test_no_sum_of_gradients_is_a_separate_pass(compute):
    group = make_group("loras")
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    outs = compute(group, x)
    loss = sum(out.sum() for out in outs)
    with Recorded() as recorded:
        loss.backward()
    size = torch.Size(SHAPE).numel()
    passes = [call for call in recorded.calls if torch.Size(call[1]).numel() == size]
    made = [name for name, _ in passes if name not in ("view", "_unsafe_view", "detach")]
    assert made == ["mm", "addmm_", "addmm_", "addmm_"]  # q, k, v and the LoRAs


def test_an_input_without_gradients_costs_no_product_with_the_weights():
    group = make_group("loras")
    outs = compute_products(group, torch.randn(SHAPE, dtype=torch.float64))
    with Recorded() as recorded:
        sum(out.sum() for out in outs).backward()
    assert not any(torch.Size(shape).numel() == 2 * 4 * IN for _, shape in recorded.calls)
    assert all(p.grad is not None for p in list_parameters(group))


@pytest.mark.parametrize("name", GROUPS)
def test_nothing_of_the_inputs_size_is_kept_by_the_second_half(name):
    group = make_group(name)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    begun = begin_products(group, x * 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved = []
        finish_products(group, begun)
    weights = {p.data_ptr() for linear in group for p in linear.parameters()}
    kept = [t for t in saved if t.data_ptr() not in weights]
    assert not any(t.shape[-1] == IN and t.shape.numel() == x.numel() for t in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loras_in_float32_beside_a_base_of_few_bits_are_as_exact_as_each_alone(dtype):
    torch.manual_seed(0)
    bases = [nn.Linear(64, 48, dtype=dtype).requires_grad_(False) for _ in range(3)]
    group = [
        LoraLinear(base, torch.randn(4, 64) / 8, torch.randn(48, 4) / 4, alpha=4.0)
        for base in bases
    ]
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    exact = [copy.deepcopy(layer).double() for layer in group]
    wide = x.detach().double().requires_grad_()
    expected = compute_gradients(exact, compute_alone(exact), wide)

    def measure(compute):
        found = compute_gradients(group, compute, x)
        assert [g.dtype for g in found] == [dtype, *[torch.float32] * 6]
        return [
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in zip(found, expected, strict=True)
        ]

    alone = measure(compute_alone(group))
    for compute in (lambda x: compute_products(group, x), compute_in_halves(group)):
        for error, other in zip(measure(compute), alone, strict=True):
            assert error <= 1.05 * other


def test_a_trained_hooked_or_special_weight_is_left_to_its_module():
    plain = make_base(4)
    assert read_base(plain) is not None
    assert read_base(make_lora(plain)) is not None
    assert read_base(make_base(4, "codes")) is not None
    trained = nn.Linear(IN, 4)
    assert read_base(trained) is None

    class Special(nn.Linear):
        pass

    assert read_base(Special(IN, 4).requires_grad_(False)) is None
    handle = plain.register_forward_pre_hook(lambda *_: None)
    assert read_base(plain) is None
    handle.remove()
    assert read_base(plain) is not None
    plain.forward = plain.forward
    assert read_base(plain) is None


@pytest.mark.parametrize("has_lora", [False, True])
def test_a_rotated_base_gives_the_result_of_its_unrotated_weight(has_lora):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (24, 32), generator=generator, dtype=torch.int8)
    weight = BaseWeight(codes, torch.rand(24, 1, generator=generator) / 100, rotation=16)
    base = build_scaled_linear(weight, None)
    linear = base
    if has_lora:
        downs = torch.randn(4, 32, generator=generator)
        linear = LoraLinear(base, downs, torch.randn(24, 4, generator=generator), 4.0)
    x = torch.randn(2, 5, 32, generator=generator, requires_grad=True)
    grad = torch.randn(2, 5, 24, generator=generator)
    dense = weight.values + (linear.up @ linear.down if has_lora else 0)
    for out in (
        *compute_products([linear], x),
        *finish_products([linear], begin_products([linear], x)),
    ):
        torch.testing.assert_close(out, x @ dense.T, rtol=1e-4, atol=1e-4)
        (found,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        torch.testing.assert_close(found, grad @ dense, rtol=1e-4, atol=1e-4)
