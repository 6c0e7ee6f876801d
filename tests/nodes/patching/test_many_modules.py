"""The side path on the module list of a whole model: 60 blocks of 14 Linears, at width 16."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, LoraWeights
from qwen_edit_lora.lora_core.adapter.strengths import Strengths
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.comfy

WIDTH = 16
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear")


class CountedOperations(TorchDispatchMode):
    """Names of all tensor operations that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> list[str]:
        return [name for name in self.names if name in PRODUCTS]


@pytest.fixture
def model(comfyui):
    """Bare Linears with the names of a full Qwen-Image, under ComfyUI's ModelPatcher."""
    root = torch.nn.Module()
    for block in range(60):
        for name in QWEN_IMAGE.block_linears:
            parent = root
            *parents, last = f"transformer_blocks.{block}.{name}".split(".")
            for part in parents:
                if not hasattr(parent, part):
                    setattr(parent, part, torch.nn.Module())
                parent = getattr(parent, part)
            setattr(parent, last, torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False))
    whole = torch.nn.Module()
    whole.diffusion_model, whole.get_dtype = root, lambda: torch.float32
    cpu = torch.device("cpu")
    return comfyui.model_patcher.ModelPatcher(whole, cpu, cpu)


def build_adapter(rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    paths = [
        f"transformer_blocks.{b}.{name}" for b in range(60) for name in QWEN_IMAGE.block_linears
    ]
    return Adapter(
        {
            path: LoraWeights(
                torch.randn(rank, WIDTH, generator=generator),
                torch.randn(WIDTH, rank, generator=generator),
            )
            for path in paths
        },
        name=f"rank {rank}",
    )


def test_a_strength_change_runs_no_tensor_operation_over_840_modules(ours, model):
    adapter = build_adapter(4, seed=0)
    ours.application.apply_adapters(model, [(adapter, Strengths(1.0))])
    with CountedOperations() as counted:
        applied = ours.application.apply_adapters(model, [(adapter, Strengths(0.5))])
    assert counted.names == []
    assert "side path: 840 modules" in applied.to_text()


def test_three_adapters_cost_one_down_and_one_up_product_per_module(ours, model):
    layers = [
        (build_adapter(rank, seed=rank), Strengths(strength))
        for rank, strength in ((4, 1.0), (2, -0.5), (3, 0.25))
    ]
    patched = ours.application.apply_adapters(model, layers).model
    side_path = ours.side_path.get_side_path(patched)
    diffusion_model = model.model.diffusion_model
    plan = side_path.get_plan(diffusion_model)
    assert len(plan) == 840
    x = torch.randn(5, WIDTH)
    path = "transformer_blocks.59.img_mlp.net.2"
    linear = diffusion_model.get_submodule(path)
    with torch.inference_mode(), CountedOperations() as counted:
        base = linear(x)
    base_products = len(counted.products)
    assert base_products == 1
    with (
        torch.inference_mode(),
        ours.side_path.swapped_forwards(diffusion_model, side_path),
        CountedOperations() as counted,
    ):
        y = linear(x)
    assert len(counted.products) == base_products + 2
    for adapter, strengths in layers:
        weights = adapter.modules[path]
        base = base + strengths.strength * x @ weights.lora_A.T @ weights.lora_B.T
    torch.testing.assert_close(y, base, rtol=1e-4, atol=1e-4)
