"""The forward pass: dropout, checkpointing, compilation, types."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.injection.layers import DoraLinear

from .conftest import ALL, TO_Q, WIDTH, compute_alone, compute_loss, randomise, run


def test_dropout_acts_in_training_only_and_keeps_the_mean(model):
    injection = inject(model, LoraSettings(rank=2, dropout=0.25, targets=(TO_Q,)), torch.float64)
    randomise(injection)
    layer = injection.layers[TO_Q]
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    torch.manual_seed(0)
    layer.train()
    added = layer(x.expand(20000, -1)) - layer.base(x)
    layer.eval()
    expected = layer(x) - layer.base(x)
    torch.testing.assert_close(added.mean(0, keepdim=True), expected, atol=0.02, rtol=0.05)
    assert (added.std(0) > 0.1 * expected.abs().mean()).all()
    torch.testing.assert_close(expected, compute_alone(layer, x) - layer.base(x))


def test_gradients_are_the_same_under_gradient_checkpointing(model):
    twin = copy.deepcopy(model)
    injections = [
        inject(m, LoraSettings(rank=2, use_dora=True), torch.float64) for m in (model, twin)
    ]
    for injection in injections:
        randomise(injection)
    twin.enable_gradient_checkpointing()
    for m in (model, twin):
        m.train()
        compute_loss(m).backward()
    for a, b in zip(*(injection.parameters() for injection in injections), strict=True):
        assert torch.equal(a.grad, b.grad)
    for layer in injections[1].layers.values():
        assert layer.shared is None or layer.shared.x is None


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_a_block_compiles_into_one_graph(name, model):
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    expected = run(model)
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model), expected)
    torch.testing.assert_close(run(model), expected)


def test_tokens_are_not_widened_to_the_dtype_of_the_lora(model):
    """The products run in bfloat16 while the trained weights and their gradients are float32."""
    model.bfloat16()
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    seen = set()
    layer = injection.layers[TO_Q]
    project = layer.project

    def watch(x):
        hidden = project(x)
        seen.add((x.dtype, hidden.dtype))
        return hidden

    layer.project = watch
    run(model, torch.bfloat16).float().sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in injection.parameters()} == {torch.float32}
    assert layer.lora_A.grad.dtype == torch.float32


def test_autocast_runs_the_lora_in_its_dtype(model):
    model.float()
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    expected = run(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert injection.layers[TO_Q](torch.randn(3, WIDTH)).dtype == torch.bfloat16
        out = run(model, torch.float32)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


def test_a_dora_norm_needs_no_dense_delta_and_is_that_of_the_dense_weight(model):
    injection = inject(model, ALL["dora"], torch.float64)
    randomise(injection)
    for layer in injection.layers.values():
        assert isinstance(layer, DoraLinear)
        dense = layer.base.weight + layer.scale * (layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(layer.compute_norm(), dense.norm(dim=1).detach())
