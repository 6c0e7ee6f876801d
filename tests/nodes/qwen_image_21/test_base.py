"""The tiny 2.1 that the tests of this folder build on is the real architecture."""

from __future__ import annotations

import pytest
import torch
from demo_base import dit_21

pytestmark = pytest.mark.comfy


def test_the_files_have_every_key_of_diffusers_class():
    from diffusers import QwenImage21Transformer2DModel

    model = QwenImage21Transformer2DModel(
        num_layers=dit_21.NUM_BLOCKS,
        attention_head_dim=dit_21.HEAD_WIDTH,
        num_attention_heads=dit_21.NUM_HEADS,
        context_in_dim=dit_21.TEXT_WIDTH,
        axes_dims_rope=(8, 28, 28),
    )
    model.load_state_dict(dit_21.make_dit(), strict=True)


@pytest.mark.parametrize(
    ("layout", "linears"), [("split", 22), ("fused", 20), ("int8_convrot", 20)]
)
def test_the_stock_loader_builds_the_modules_of_the_file(layout, linears, load_21):
    root = load_21(layout).model.diffusion_model
    assert sum(hasattr(module, "in_features") for module in root.modules()) == linears
    assert hasattr(root.transformer_blocks[0].img_mlp, "gate_up") == (layout != "split")


def test_split_and_fused_files_give_the_same_image_and_int8_nearly_the_same(load_21, sample_21):
    split = sample_21(load_21("split"))
    assert split.shape == (1, dit_21.CHANNELS, 8, 6)
    assert split.isfinite().all()
    fused = sample_21(load_21("fused"))
    assert torch.equal(fused, split)
    distance = (sample_21(load_21("int8_convrot")) - split).norm() / split.norm()
    assert 0 < distance < 0.02


def test_the_reference_and_its_place_in_the_text_reach_the_image(
    load_21, sample_21, conditioning_21
):
    base = load_21("fused")
    before = sample_21(base)
    values = conditioning_21[0][1]
    values["image_slots"] = [7]
    moved = sample_21(base)
    values["reference_latents"] = [values["reference_latents"][0].flip(-1)]
    assert not torch.equal(moved, before)
    assert not torch.equal(sample_21(base), moved)
