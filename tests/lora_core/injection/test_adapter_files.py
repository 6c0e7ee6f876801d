"""From layers to files and states, and back: exact, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
    NonFiniteWeightsError,
    ShapeError,
    TargetError,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.adapter.adapter import Adapter
from qwen_edit_lora.lora_core.adapter.weights import LoraWeights
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject

from .conftest import ALL, SETTINGS, TO_K, TO_Q, WIDTH, assert_same_bits, list_bits, randomise, run


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "peft"])
@pytest.mark.parametrize("name", ALL)
def test_the_file_holds_exactly_the_change_of_the_forward_pass(name, key_format, model, tmp_path):
    if key_format == "kohya" and "dora" in name:
        key_format = "diffusers"
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    trained = run(model)
    written = injection.build_adapter("my edit")
    adapter = read_adapter(write_adapter(written, tmp_path / "my_edit", key_format))
    injection.eject()
    with torch.no_grad():
        for path, weights in adapter.modules.items():
            linear = model.get_submodule(path)
            linear.weight.add_(compute_delta(weights, linear.weight))
    torch.testing.assert_close(run(model), trained, atol=1e-9, rtol=1e-9)


def test_an_adapter_is_a_copy_that_further_training_does_not_change(model):
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    adapter = injection.build_adapter()
    before = adapter.modules[TO_Q].lora_A.clone()
    randomise(injection, 3)
    assert torch.equal(adapter.modules[TO_Q].lora_A, before)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_an_adapter_can_be_built_from_other_numbers_than_the_layers(name, model):
    injection = inject(model, ALL[name])
    randomise(injection, 3)
    expected = injection.build_adapter().modules
    tensors = {key: p.detach().clone() for key, p in injection.named_parameters()}
    randomise(injection, 4)
    found = injection.build_adapter(tensors=tensors).modules
    for path, weights in expected.items():
        for part, tensor in weights.parts.items():
            assert torch.equal(found[path].parts[part], tensor)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("key_format", ["comfyui", "diffusers"])
def test_training_continues_from_a_file_bit_exactly(name, key_format, model, tmp_path):
    first = inject(model, SETTINGS[name])
    randomise(first)
    trained = run(model)
    path = write_adapter(first.build_adapter("a"), tmp_path / "a.safetensors", key_format)
    first.eject()
    second = inject(model, SETTINGS[name], seed=9)
    assert second.load(read_adapter(path)) == ()
    assert torch.equal(run(model), trained)


def test_the_scale_of_the_file_is_kept_when_training_continues(model, make_state_dict):
    adapter = inject(copy.deepcopy(model), LoraSettings(rank=2, alpha=1.0, targets=(TO_Q,)))
    randomise(adapter)
    injection = inject(model, LoraSettings(rank=2, alpha=16.0))
    fresh = injection.load(adapter.build_adapter())
    assert TO_Q not in fresh
    assert len(fresh) == len(injection.layers) - 1
    assert (injection.layers[TO_Q].scale, injection.layers[TO_K].scale) == (0.5, 8.0)
    assert injection.build_adapter().modules[TO_Q].alpha == 1.0


def make_adapter(path=TO_Q, rank=2, shape=(WIDTH, WIDTH), bias=None, value=0.1):
    lora_A, lora_B = torch.full((rank, shape[1]), value), torch.full((shape[0], rank), value)
    return Adapter({path: LoraWeights(lora_A, lora_B, 1.0, bias)}, name="old.safetensors")


@pytest.mark.parametrize(
    ("adapter", "error", "sentence"),
    [
        (make_adapter(rank=4), ConfigError, "has rank 4 at .*to_q, the settings ask for 2"),
        (make_adapter(shape=(8, 8)), ShapeError, r"of \(8, 8\), but the model's is \(16, 16\)"),
        (make_adapter("img_in"), TargetError, r"1 module that would not be trained.*\(img_in\)"),
        (make_adapter(bias=torch.ones(WIDTH)), ConfigError, "also changes the bias"),
        (make_adapter(value=float("inf")), NonFiniteWeightsError, "holds NaN or Inf"),
    ],
)
def test_a_file_that_cannot_be_continued_is_refused_with_a_message(adapter, error, sentence, model):
    injection = inject(model, LoraSettings(rank=2))
    before = list_bits(model)
    with pytest.raises(error, match=sentence):
        injection.load(adapter)
    assert_same_bits(model, before)


def test_another_kind_of_adapter_is_refused(model, make_state_dict):
    loha = read_state_dict(make_state_dict("lycoris", [TO_Q], rank=2, kind="LoHa"))
    with pytest.raises(ConfigError, match=r"holds LoHa weights for .*, the settings ask for LoRA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2)).load(loha)
    with pytest.raises(ConfigError, match=r"holds LoRA weights for .*, the settings ask for DoRA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2, use_dora=True)).load(make_adapter())
    with pytest.raises(ConfigError, match="cannot be continued with PiSSA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2, init="pissa")).load(make_adapter())


def test_inert_modules_in_a_file_do_not_keep_it_from_being_continued(model):
    path = "transformer_blocks.1.attn.to_add_out"
    injection = inject(model, LoraSettings(rank=2))
    assert len(injection.load(make_adapter(path))) == len(injection.layers)


@pytest.mark.parametrize("name", ALL)
def test_the_state_restores_every_bit(name, model):
    first = inject(copy.deepcopy(model), ALL[name], seed=1)
    randomise(first)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = inject(model, ALL[name], seed=2)
    parameters = second.parameters()
    second.load_state_dict(state)
    assert all(a is b for a, b in zip(parameters, second.parameters(), strict=True))
    assert torch.equal(run(model), run(first.model))
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        (LoraSettings(rank=3), ShapeError, r"lora_A as \(2, 16\), the settings give \(3, 16\)"),
        (LoraSettings(rank=2, use_dora=True), ConfigError, "differ in 20 tensors"),
        (LoraSettings(rank=2, targets=("mlp",)), ConfigError, "differ in .* tensors"),
    ],
)
def test_a_state_of_other_settings_is_refused(settings, error, sentence, model):
    state = inject(copy.deepcopy(model), LoraSettings(rank=2)).state_dict()
    with pytest.raises(error, match=sentence):
        inject(model, settings).load_state_dict(state)


def test_a_state_of_another_precision_is_refused(model):
    state = inject(copy.deepcopy(model), LoraSettings(rank=2)).state_dict()
    with pytest.raises(ConfigError, match=r"as torch.float32, the settings give torch.bfloat16"):
        inject(model, LoraSettings(rank=2), torch.bfloat16).load_state_dict(state)
