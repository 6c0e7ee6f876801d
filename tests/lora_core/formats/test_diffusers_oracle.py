"""diffusers as oracle, for formats that it reads."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    LoraWeights,
    compute_delta,
    read_adapter,
    write_adapter,
)
from qwen_edit_lora.lora_core.base_model import module_paths
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

RANK = 4
LINEARS = [
    *(
        f"transformer_blocks.{block}.{name}"
        for block in range(2)
        for name in QWEN_IMAGE.block_linears
    ),
    *QWEN_IMAGE.top_linears,
]


@pytest.fixture(scope="module")
def transformer():
    """A Qwen-Image transformer of two blocks and width 64."""
    torch.manual_seed(0)
    return diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 14, 14),
        in_channels=64,
        out_channels=16,
    )


def make_adapter(transformer, alphas, ranks) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for index, path in enumerate(LINEARS):
        out, in_ = transformer.get_submodule(path).weight.shape
        rank, alpha = ranks[index % len(ranks)], alphas[index % len(alphas)]
        lora_A = torch.randn(rank, in_, generator=generator)
        lora_B = torch.randn(out, rank, generator=generator)
        modules[path] = LoraWeights(lora_A, lora_B, alpha)
    return Adapter(modules)


def load_into(transformer, path):
    """Loads like a pipeline's load_lora_weights, then fuses into the weights."""
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    model = copy.deepcopy(transformer)
    state_dict, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state_dict, model, metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
    return model


def assert_same_change(adapter, before, after):
    for path in LINEARS:
        change = after.get_submodule(path).weight - before.get_submodule(path).weight
        torch.testing.assert_close(
            compute_delta(adapter.modules[path]), change.detach(), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("key_format", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize(
    ("alphas", "ranks"),
    [([6.0], [4]), ([6.0, 2.0, 5**0.5], [4]), ([4.0, 1.0, 3.0], [4, 2])],
    ids=["one alpha", "alphas differ", "ranks differ too"],
)
def test_a_file_we_write_has_the_same_effect_in_diffusers(
    key_format, alphas, ranks, transformer, tmp_path
):
    adapter = make_adapter(transformer, alphas, ranks)
    path = write_adapter(adapter, tmp_path / "ours.safetensors", key_format)
    assert_same_change(adapter, transformer, load_into(transformer, path))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"to_q": 10}, "rank_pattern": {"to_k": 2}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_file_saved_by_diffusers_reads_as_what_it_fuses(settings, transformer, tmp_path):
    model = copy.deepcopy(transformer)
    model.add_adapter(peft.LoraConfig(r=RANK, target_modules=LINEARS, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(adapter.report.alpha_rules) <= {"metadata", "metadata (rsLoRA)"}
    model.fuse_lora()
    model.unload_lora()
    assert_same_change(adapter, transformer, model)


def test_a_file_saved_by_a_pipeline_carries_the_prefix_and_reads_alike(transformer, tmp_path):
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    model = copy.deepcopy(transformer)
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=LINEARS))
    QwenImageLoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.key_format == "diffusers"
    assert adapter.report.scales == {0.5: len(LINEARS)}


def test_every_known_linear_and_norm_is_a_module_of_diffusers(transformer):
    with_weight = {
        name
        for name, module in transformer.named_modules()
        if getattr(module, "weight", None) is not None
    }
    assert with_weight == set(QWEN_IMAGE.list_module_paths(num_blocks=2))


def test_the_shapes_at_full_size_are_those_of_diffusers():
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel(num_layers=1)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert shapes == {
        path: QWEN_IMAGE.compute_shape(module_paths.split_path(path)[1]) for path in shapes
    }
