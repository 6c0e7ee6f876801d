"""Precision of the storages of a base weight, and gradients through them."""

from __future__ import annotations

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight
from qwen_edit_lora.lora_core.training.model.frozen_linear import FrozenLinear, build_scaled_linear
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.quantization import (
    STORAGES,
    build_linear,
    quantize_rows,
)
from qwen_edit_lora.lora_core.training.model.weight_reader import WeightReader
from safetensors.torch import save_file

TO_Q = "transformer_blocks.0.attn.to_q"
CPU = torch.device("cpu")
IMG_MOD = "transformer_blocks.0.img_mod.1"
#: Upper bounds of a storage's relative rounding error for a normally distributed weight.
ERRORS = {"fp32": 0.0, "bf16": 0.002, "fp8": 0.028, "int8": 0.008, "nf4": 0.1, "as stored": 0.0}


def load(tmp_path, storage, state_dict=None, compute_dtype=torch.float32):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509", "fp32", state_dict)
    return load_transformer(path, storage, compute_dtype=compute_dtype)


def get_values(linear) -> torch.Tensor:
    return linear.dequantize() if hasattr(linear, "dequantize") else linear.weight.float()


def compute_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_is_as_exact_as_stated(storage, tmp_path):
    model = load(tmp_path, storage)
    state_dict = dit.make_dit("2509")
    for path in (TO_Q, "transformer_blocks.1.txt_mlp.net.2"):
        linear = model.transformer.get_submodule(path)
        error = compute_error(get_values(linear), state_dict[f"{path}.weight"])
        assert ERRORS[storage] * 0.5 <= error <= ERRORS[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_outside_the_blocks_nothing_is_rounded(storage, tmp_path):
    model = load(tmp_path, storage)
    state_dict = dit.make_dit("2509")
    outside = [n for n, _ in model.transformer.named_parameters() if "blocks" not in n]
    assert "proj_out.weight" in outside
    for name in outside:
        assert torch.equal(model.transformer.get_parameter(name), state_dict[name])


def test_nf4_keeps_modulation_in_eight_bits(tmp_path):
    model = load(tmp_path, "nf4")
    assert model.transformer.get_submodule(IMG_MOD).weight.dtype == torch.int8
    assert model.transformer.get_submodule(TO_Q).weight.dtype == torch.uint8


class OneWeight:
    """Stands in for a base file with a single weight."""

    name = "one"
    file = None

    def __init__(self, weight):
        self.weight = weight

    def read_weight(self, module_path):
        return self.weight

    def read_tensor(self, key):
        return None


BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "nf4": 0.516}


@pytest.mark.parametrize("storage", BYTES)
def test_a_storage_takes_the_stated_bytes(storage):
    # One wide Linear, in which scales and tables are small, as in the full model.
    weight = BaseWeight(torch.randn(512, 1024), None)
    linear = build_linear(WeightReader(OneWeight(weight), CPU), TO_Q, storage, torch.bfloat16)
    tensors = [*linear.parameters(), *linear.buffers()]
    size = sum(t.numel() * t.dtype.itemsize for t in tensors)
    assert size / weight.stored.numel() == pytest.approx(BYTES[storage], rel=0.01)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", STORAGES)
def test_forward_and_backward_use_the_dequantised_weight(storage, compute_dtype, tmp_path):
    model = load(tmp_path, storage, compute_dtype=compute_dtype)
    for path in (TO_Q, IMG_MOD):
        linear = model.transformer.get_submodule(path)
        weight = get_values(linear).to(compute_dtype)
        x = torch.randn(5, linear.in_features).to(compute_dtype).requires_grad_()
        other = x.detach().clone().requires_grad_()
        out = linear(x)
        expected = torch.nn.functional.linear(other, weight, linear.bias)
        torch.testing.assert_close(out, expected)
        seed = torch.randn(out.shape).to(compute_dtype)
        out.backward(seed)
        expected.backward(seed)
        torch.testing.assert_close(x.grad, other.grad)
        assert all(p.grad is None for p in linear.parameters())


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_pass_through_the_whole_model(storage, tmp_path):
    model = load(tmp_path, storage, compute_dtype=torch.bfloat16)
    model.enable_gradient_checkpointing()
    latents = torch.randn(1, 16, 8, 8, requires_grad=True)
    text = torch.randn(1, 5, dit.TEXT_WIDTH, requires_grad=True)
    out = model(latents, [torch.randn(1, 16, 6, 6)], text, None, torch.tensor([0.5]))
    out.float().square().mean().backward()
    for x in (latents, text):
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


def test_no_widened_weight_is_kept_for_the_backward_pass(tmp_path):
    linear = load(tmp_path, "fp8").transformer.get_submodule(TO_Q)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear(torch.randn(2, linear.in_features, requires_grad=True))
    shape = linear.weight.shape
    assert {x.dtype for x in saved if x.shape == shape} == {torch.float8_e4m3fn}


FILES = {"fp8": "fp8", "fp8_scaled": "fp8", "int8": "int8"}


def write_stored(tmp_path, kind):
    """A file of that kind, and the values its codes decode to."""
    state_dict = dit.make_dit("2509")
    if kind != "int8":
        stored = dit.store_as(state_dict, kind)
    else:
        stored = dict(state_dict)
        scale = state_dict[f"{TO_Q}.weight"].abs().amax(dim=1, keepdim=True) / 127
        stored[f"{TO_Q}.weight"] = (state_dict[f"{TO_Q}.weight"] / scale).round().to(torch.int8)
        stored[f"{TO_Q}.weight_scale"] = scale
    save_file(stored, tmp_path / "dit.safetensors")
    scale = stored.get(f"{TO_Q}.weight_scale", torch.tensor(1.0))
    return tmp_path / "dit.safetensors", stored, stored[f"{TO_Q}.weight"].float() * scale


@pytest.mark.parametrize("kind", FILES)
def test_codes_of_the_file_are_kept_as_they_are(kind, tmp_path):
    path, stored, values = write_stored(tmp_path, kind)
    for storage in ("as stored", FILES[kind]):
        linear = load_transformer(path, storage).transformer.get_submodule(TO_Q)
        codes = stored[f"{TO_Q}.weight"]
        assert torch.equal(linear.weight.view(torch.uint8), codes.view(torch.uint8))
        torch.testing.assert_close(linear.dequantize(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("storage", ["bf16", "fp32", "nf4"])
def test_codes_of_the_file_are_widened_before_another_storage(kind, storage, tmp_path):
    path, _, values = write_stored(tmp_path, kind)
    linear = load_transformer(path, storage).transformer.get_submodule(TO_Q)
    assert compute_error(get_values(linear), values) <= ERRORS[storage]


def test_int8_rounds_as_torchao_does():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64, bias=False)
    weight = BaseWeight(linear.weight.detach().clone(), None)
    chunks = WeightReader(OneWeight(weight), CPU).read_values(weight, "w")
    ours = quantize_rows(weight.stored.shape, chunks, torch.int8, CPU)
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    theirs = linear.weight.dequantize().float()
    scale = ours.scale.max()
    # Their limit is 127.5, ours ComfyUI's 127: never more than a step apart.
    assert (ours.values - theirs).abs().max() < scale
    assert compute_error(ours.values, weight.values) <= 1.01 * compute_error(theirs, weight.values)


def test_rows_of_zeros_stay_zeros(tmp_path):
    state_dict = dit.make_dit("2509")
    state_dict[f"{TO_Q}.weight"][7] = 0
    for storage in ("fp8", "int8", "nf4"):
        linear = load(tmp_path, storage, state_dict).transformer.get_submodule(TO_Q)
        assert (linear.dequantize()[7] == 0).all()


def test_a_linear_that_needs_no_conversion_is_torchs_own(tmp_path):
    model = load(tmp_path, "bf16", compute_dtype=torch.bfloat16)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())


def test_a_scaled_linear_compiles_into_one_graph():
    weight = BaseWeight(torch.randn(8, 4).to(torch.float8_e4m3fn), torch.rand(8, 1))
    linear = build_scaled_linear(weight, torch.randn(8))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, other = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    out = compiled(x)
    torch.testing.assert_close(out, linear(other))
    out.sum().backward()
    linear(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
