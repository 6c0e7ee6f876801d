"""Scales, shifts and gates of two parts of a stream: as if each part were computed separately."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core.training.model.modulation import add_gated, add_scaled, modulate
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, TOKENS, WIDTH = 2, 5, 4
SPLITS = [None, 2, 5]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def draw_parameters(split, times, seed=5, **options):
    return draw(BATCH if split is None else 2 * BATCH, 1, times * WIDTH, seed=seed, **options)


def spread(parameters, split):
    """Expands to one value per token: (B, L, D)."""
    if split is None:
        return parameters.expand(-1, TOKENS, -1)
    first, second = parameters.chunk(2)
    return torch.cat([first.expand(-1, split, -1), second.expand(-1, TOKENS - split, -1)], dim=1)


@pytest.mark.parametrize("split", SPLITS)
def test_modulation_is_that_of_parameters_by_token(split):
    x, parameters = draw(BATCH, TOKENS, WIDTH), draw_parameters(split, 3)
    found, gate = modulate(x, parameters, split)
    shift, scale, expected_gate = spread(parameters, split).chunk(3, dim=-1)
    expected = x * (1 + scale) + shift
    torch.testing.assert_close(found, expected)
    assert torch.equal(spread(gate, split), expected_gate)
    for out in (found, expected):
        x.grad = parameters.grad = None
        (out.sin().sum() + gate.sum()).backward(retain_graph=True)
        if out is found:
            gradients = x.grad.clone(), parameters.grad.clone()
    torch.testing.assert_close(gradients, (x.grad, parameters.grad))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_gradients_are_those_of_finite_differences(wanted, split):
    x, change = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH, seed=1)
    gate = draw_parameters(split, 1)
    for tensor, is_wanted in zip((x, change, gate), wanted, strict=True):
        tensor.requires_grad_(bool(is_wanted))
    assert torch.autograd.gradcheck(lambda *t: add_gated(*t, split), (x, change, gate))
    term = draw_parameters(split, 1, seed=6).requires_grad_(bool(wanted[0]))
    assert torch.autograd.gradcheck(lambda *t: add_scaled(*t, split), (term, change, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_have_the_bits_of_each_alone(dtype):
    x, change = (draw(BATCH, TOKENS, WIDTH, seed=i, dtype=dtype) for i in range(2))
    gate = draw_parameters(2, 1, dtype=dtype)
    parts = zip((slice(2), slice(2, None)), gate.chunk(2), strict=True)
    alone = [torch.addcmul(x[:, s], one, change[:, s]) for s, one in parts]
    assert torch.equal(add_gated(x, change, gate, 2), torch.cat(alone, dim=1))


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_no_part_is_copied():
    x, change = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH, seed=1)
    gate = draw_parameters(2, 1).detach()
    with Copies() as copies:
        out = add_gated(x, change, gate, 2)
        torch.autograd.grad(out, (x, change), torch.ones_like(out))
    assert not {"cat", "copy_", "clone", "slice_backward", "add"} & set(copies.names)


def test_nothing_is_kept_where_the_parameters_are_frozen():
    x, gate = draw(BATCH, TOKENS, WIDTH), draw_parameters(2, 1).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_gated(x, x * 2, gate, 2)
    assert all(t.shape != x.shape for t in saved)
