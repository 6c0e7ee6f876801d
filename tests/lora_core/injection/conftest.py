"""Two blocks of diffusers' own model, and the settings that tests inject."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core.injection.inject import LoraSettings

WIDTH, TEXT_WIDTH, TOKENS, TEXT_TOKENS = 16, 12, 16, 5
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"


@pytest.fixture(scope="module")
def diffusers_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    return model.double()


@pytest.fixture
def model(diffusers_model):
    """Two blocks of the real architecture in float64, so that differences are not rounding."""
    return copy.deepcopy(diffusers_model)


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, TOKENS, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(
            dtype
        ),
        "timestep": torch.tensor([0.3, 0.8], dtype=dtype),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "return_dict": False,
    }


def run(model, dtype=torch.float64):
    return model(**make_inputs(dtype))[0]


def compute_loss(model):
    out = run(model)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def randomise(injection, seed=2):
    """Moves every parameter from its initial value, so that no part of an adapter is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in injection.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.abs() if "magnitude" in name else noise)


def list_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, bits):
    state_dict = model.state_dict()
    assert list(state_dict) == list(bits)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in state_dict.items())


SETTINGS = {
    "plain": LoraSettings(rank=3, alpha=5.0),
    "alpha is the rank": LoraSettings(rank=4),
    "rslora": LoraSettings(rank=3, alpha=5.0, use_rslora=True),
    "dora": LoraSettings(rank=3, alpha=5.0, use_dora=True),
    "dora with rslora": LoraSettings(rank=3, alpha=5.0, use_dora=True, use_rslora=True),
    "rank_pattern": LoraSettings(rank=3, alpha=5.0, rank_pattern={"mlp": 2, "*.0.attn.to_q": 5}),
    "modulation": LoraSettings(rank=2, targets=("modulation", "img_in", "norm_out.linear")),
}


ALL = {
    **SETTINGS,
    "pissa": LoraSettings(rank=3, alpha=5.0, init="pissa"),
    "pissa with dora": LoraSettings(rank=3, alpha=5.0, init="pissa", use_dora=True),
    "gaussian": LoraSettings(rank=3, init="gaussian"),
    "orthogonal": LoraSettings(rank=3, init="orthogonal"),
}


def train(model, injection, num_steps=3):
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
    for _ in range(num_steps):
        compute_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def compute_alone(layer, x):
    hidden = torch.nn.functional.linear(x, layer.down)
    return layer.base(x) + layer.scale * torch.nn.functional.linear(hidden, layer.up)
