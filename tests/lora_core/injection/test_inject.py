"""Trainable LoRAs in diffusers' own model: PEFT, dense float64 algebra and the base as oracles."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
)
from qwen_edit_lora.lora_core.injection.initialization import compute_principal_factors
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection
from qwen_edit_lora.lora_core.injection.layers import LoraLinear

from .conftest import (
    ALL,
    SETTINGS,
    TO_K,
    TO_Q,
    assert_same_bits,
    compute_loss,
    list_bits,
    make_inputs,
    randomise,
    run,
    train,
)


def build_peft_twin(model, plan, injection):
    """PEFT's layers over the same modules, with the same values."""
    peft = pytest.importorskip("peft")
    settings = plan.settings
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=[target.module_path for target in plan.targets],
        rank_pattern={f"^{t.module_path}$": t.rank for t in plan.targets},
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    twin = peft.inject_adapter_in_model(config, copy.deepcopy(model)).double()
    for path, layer in injection.layers.items():
        theirs = twin.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.lora_A.detach().clone()
        theirs.lora_B["default"].weight.data = layer.lora_B.detach().clone()
        if settings.use_dora:
            theirs.lora_magnitude_vector["default"].weight.data = layer.magnitude.detach().clone()
    return twin


@pytest.mark.parametrize("name", SETTINGS)
def test_output_and_gradients_are_those_of_peft(name, model):
    plan = plan_injection(model, SETTINGS[name])
    base = copy.deepcopy(model)
    injection = inject(model, plan, torch.float64)
    randomise(injection)
    twin = build_peft_twin(base, plan, injection)
    torch.testing.assert_close(run(model), run(twin), atol=1e-9, rtol=1e-9)
    compute_loss(model).backward()
    compute_loss(twin).backward()
    for path, layer in injection.layers.items():
        theirs = twin.get_submodule(path)
        pairs = [(layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)]
        if plan.settings.use_dora:
            pairs.append((layer.magnitude, theirs.lora_magnitude_vector))
        for ours, other in pairs:
            torch.testing.assert_close(ours.grad, other["default"].weight.grad, msg=path)
            assert ours.grad.abs().max() > 0


def test_magnitudes_start_where_peft_starts(model):
    base = copy.deepcopy(model)
    plan = plan_injection(model, LoraSettings(rank=2, use_dora=True))
    injection = inject(model, plan, torch.float64)
    started = {path: layer.magnitude.detach().clone() for path, layer in injection.layers.items()}
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(injection.layers), use_dora=True)
    twin = peft.inject_adapter_in_model(config, base)
    for path, magnitude in started.items():
        theirs = twin.get_submodule(path).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, theirs.detach(), check_dtype=False)


@pytest.mark.parametrize("name", ["plain", "rslora", "dora", "pissa"])
def test_gradients_are_those_of_a_dense_weight(name, model):
    """Autograd through W + delta written out as a matrix, in a copy of the model."""
    dense_model = copy.deepcopy(model)
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    weights, leaves = {}, {}
    for path, layer in injection.layers.items():
        base = layer.base.weight.detach()
        a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        leaves[path] = {"lora_A": a, "lora_B": b}
        weight = base + layer.scale * (b @ a)
        if name == "pissa":  # as in its paper: a residual in place of the base
            down, up = compute_principal_factors(base, layer.rank, layer.scale)
            weight = base - layer.scale * (up @ down) + layer.scale * ((b + up) @ (a + down))
        if name == "dora":
            magnitude = layer.magnitude.detach().clone().requires_grad_()
            leaves[path]["magnitude"] = magnitude
            norm = weight.detach().norm(dim=1, keepdim=True)
            weight = magnitude[:, None] * weight / norm
        weights[f"{path}.weight"] = weight
    out = torch.func.functional_call(dense_model, weights, kwargs=make_inputs())[0]
    torch.testing.assert_close(run(model), out, atol=1e-9, rtol=1e-9)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * ramp).sum().backward()
    compute_loss(model).backward()
    for path, parts in leaves.items():
        for part, leaf in parts.items():
            ours = getattr(injection.layers[path], part).grad
            torch.testing.assert_close(ours, leaf.grad, atol=1e-8, rtol=1e-7, msg=path + part)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_forward_is_bit_identical_to_the_base(name, dtype, model):
    model.to(dtype)
    before = run(model, dtype)
    inject(model, ALL[name])
    assert torch.equal(run(model, dtype), before)


@pytest.mark.parametrize("name", ALL)
def test_the_base_is_bit_identical_after_training_and_after_ejecting(name, model):
    bits, modules = list_bits(model), dict(model.named_modules())
    model.transformer_blocks[1].attn.to_k.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    before = run(model)
    injection = inject(model, ALL[name])
    train(model, injection)
    assert not torch.equal(run(model), before)
    for path, layer in injection.layers.items():
        assert torch.equal(layer.base.weight, bits[f"{path}.weight"])
        assert layer.base.weight.grad is None
    injection.eject()
    injection.eject()  # does nothing
    assert_same_bits(model, bits)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(run(model), before)


def test_only_the_parameters_of_the_injection_are_trained(model):
    injection = inject(model, LoraSettings(rank=2, use_dora=True))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    assert sum(p.numel() for p in injection.parameters()) == injection.plan.num_parameters


def test_parameter_names_keep_their_order_regardless_of_the_targets_order(model):
    names = [
        [name for name, _ in inject(copy.deepcopy(model), settings).named_parameters()]
        for settings in (
            LoraSettings(targets=("attn.to_k", "mlp", "attn.to_q")),
            LoraSettings(targets=("mlp", "attn.to_q", "attn.to_k")),
        )
    ]
    assert names[0] == names[1]
    assert names[0][:4] == [f"{TO_Q}.lora_A", f"{TO_Q}.lora_B", f"{TO_K}.lora_A", f"{TO_K}.lora_B"]


def test_set_strength_scales_what_is_added(model):
    before = run(model)
    injection = inject(model, LoraSettings(rank=2, targets=("proj_out",)), torch.float64)
    randomise(injection)
    whole = run(model) - before
    injection.set_strength(0.25)
    torch.testing.assert_close(run(model) - before, 0.25 * whole)
    injection.set_strength(0)
    assert torch.equal(run(model), before)


def test_the_strength_of_a_dora_blends_towards_the_base(model):
    before = run(model)
    injection = inject(
        model, LoraSettings(rank=2, targets=("proj_out",), use_dora=True), torch.float64
    )
    randomise(injection)
    whole = run(model) - before
    injection.set_strength(0.5)
    torch.testing.assert_close(run(model) - before, 0.5 * whole)


def test_a_second_injection_is_refused(model):
    injection = inject(model, LoraSettings(rank=2))
    with pytest.raises(ConfigError, match="already carries a LoRA"):
        inject(model, LoraSettings(rank=2))
    injection.eject()
    inject(model, LoraSettings(rank=2)).eject()


def test_an_injection_that_is_stopped_leaves_the_model_alone(model):
    calls = itertools.count()
    with pytest.raises(InterruptedError, match="injection was stopped after 3 of 20"):
        inject(model, LoraSettings(init="pissa", rank=2), should_stop=lambda: next(calls) == 3)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
