"""The model on a fake GPU: no tensor on the wrong device, and nothing read back from it.

PyTorch's fake tensors have a device but no data: a forward pass that would wait for the device to
read a value fails.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.training.data.dataset import collect_text
from qwen_edit_lora.lora_core.training.model import rope
from qwen_edit_lora.lora_core.training.model.architecture import Architecture, choose_axes
from qwen_edit_lora.lora_core.training.model.frozen_linear import FrozenLinear, ScaledCodes
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import KINDS
from qwen_edit_lora.lora_core.training.model.transformer import EditTransformer
from small_bases import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda:0")
SETTINGS = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=4, use_dora=True),
    "dropout": LoraSettings(rank=4, dropout=0.1),
    "modulation": LoraSettings(rank=4, targets=("full + modulation",)),
}


@pytest.fixture(autouse=True)
def fake_mode():
    """A mode for each test, with an empty cache."""
    rope.compute_rotation.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    rope.compute_rotation.cache_clear()


def build(zero_cond_t: bool, settings: LoraSettings, use_codes: bool = False) -> EditTransformer:
    axes = choose_axes(TINY["attention_head_dim"])
    sizes = {"num_layers": 2, "zero_cond_t": zero_cond_t, "axes_dims_rope": axes, **TINY}
    transformer = Architecture(**sizes).build_empty()
    for module in transformer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
    if use_codes:
        for block in transformer.transformer_blocks:
            for name in ("to_q", "to_k", "to_v"):
                setattr(block.attn, name, make_codes(getattr(block.attn, name)))
    model = EditTransformer(transformer.eval(), torch.bfloat16)
    for layer in inject(transformer, settings, device=DEVICE).layers.values():
        layer.train()
    return model


def make_codes(linear: torch.nn.Linear) -> FrozenLinear:
    codes = torch.empty(linear.weight.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.empty(1, 1, device=DEVICE)
    decode = ScaledCodes("fp8")
    return FrozenLinear(*codes.shape, decode, {"weight": codes, "scale": scale}, linear.bias)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def run(model: EditTransformer, lengths: tuple[int, ...], num_references: int) -> torch.Tensor:
    """Latents of odd sides; captions as a batch has them; noise levels from the CPU."""
    text, mask = collect_text(
        [torch.randn(length, TINY["joint_attention_dim"]) for length in lengths]
    )
    size = len(lengths)
    return model(
        draw(size, 16, 33, 20),
        [draw(size, 16, 24 + i, 30) for i in range(num_references)],
        text.to(DEVICE),
        None if mask is None else mask.to(DEVICE),
        torch.rand(size),
    )


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_forward_pass_stays_on_the_device_and_never_waits_for_it(settings, zero_cond_t):
    model = build(zero_cond_t, settings)
    cases = itertools.product(KINDS, [((9,), 0), ((9, 4), 2)])
    for kind, (lengths, num_references) in cases:
        model.enable_gradient_checkpointing(kind)
        out = run(model, lengths, num_references)
        assert (out.device, out.dtype) == (DEVICE, torch.bfloat16)
        assert out.shape == (len(lengths), 16, 33, 20)
        assert out.requires_grad


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_quantised_base_never_waits_for_the_device_either(kind):
    model = build(True, LoraSettings(rank=4), use_codes=True)
    model.enable_gradient_checkpointing(kind)
    assert run(model, (9, 4), 1).requires_grad


def test_sampling_without_gradients_never_waits_for_the_device_either():
    model = build(True, LoraSettings(rank=4))
    with torch.no_grad():
        assert run(model, (9, 4), 1).device == DEVICE
