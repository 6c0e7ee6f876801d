"""Bases stored in few bits: our own and the libraries' modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
    compute_delta,
)
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.injection.layers import get_base_weight

from .conftest import ALL, TO_Q, assert_same_bits, list_bits, randomise, run, train

FP8 = torch.float8_e4m3fn


class Fp8Linear(torch.nn.Module):
    """A base that stores scaled fp8, like ComfyUI's files."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 448
        self.register_buffer("weight", (linear.weight.detach() / self.scale).to(FP8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class ReadableFp8Linear(Fp8Linear):
    def dequantize(self):
        return self.weight.double() * self.scale


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_a_quantised_base_takes_every_kind_of_lora(name, model):
    for path, _ in list(model.named_modules()):
        if path.endswith("attn.to_q"):
            parent = model.get_submodule(path.rpartition(".")[0])
            parent.to_q = ReadableFp8Linear(parent.to_q)
    before = run(model)
    bits = list_bits(model)
    injection = inject(model, ALL[name], torch.float64)
    assert torch.equal(run(model), before)
    train(model, injection)
    trained = run(model)
    adapter = injection.build_adapter()
    injection.eject()
    assert_same_bits(model, bits)
    for path, weights in adapter.modules.items():
        linear = model.get_submodule(path)
        weight = linear.dequantize() if path.endswith("attn.to_q") else linear.weight.detach()
        dense = torch.nn.Linear(*reversed(weight.shape)).double()
        dense.weight.data = weight + compute_delta(weights, weight)
        dense.bias = linear.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    torch.testing.assert_close(run(model), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_the_modules_of_the_quantisation_libraries_are_taken_as_they_are(library, name):
    module = pytest.importorskip(library)
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.proj_out = torch.nn.Linear(128, 64).bfloat16()
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(holder, Int8WeightOnlyConfig())
    else:
        linear = module.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
        linear.load_state_dict(holder.proj_out.state_dict())
        holder.proj_out = linear.to("cpu")
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    before = holder.proj_out(x)
    injection = inject(holder, replace(ALL[name], targets=("proj_out",)))
    assert torch.equal(holder.proj_out(x), before)
    randomise(injection)
    out = holder.proj_out(x)
    out.float().sum().backward()
    assert all(p.grad.any() for p in injection.parameters())
    weight = get_base_weight(injection.layers["proj_out"].base)
    dense = weight + compute_delta(injection.build_adapter().modules["proj_out"], weight)
    bias = injection.layers["proj_out"].bias.float()
    expected = torch.nn.functional.linear(x.float(), dense.float(), bias)
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_an_unreadable_base_is_refused_by_dora_and_accepted_by_lora(model):
    attention = model.transformer_blocks[0].attn
    attention.to_q = Fp8Linear(attention.to_q)
    for settings in (LoraSettings(rank=2, use_dora=True), LoraSettings(rank=2, init="pissa")):
        with pytest.raises(ConfigError, match=r"Fp8Linear stores it as float8_e4m3fn \(16, 16\)"):
            inject(model, settings)
    injection = inject(model, LoraSettings(rank=2))
    run(model).sum().backward()
    assert injection.layers[TO_Q].lora_B.grad.any()
