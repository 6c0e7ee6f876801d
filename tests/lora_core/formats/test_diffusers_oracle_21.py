"""diffusers as oracle for LoRAs of Qwen-Image-2.1, whose model is split there."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    LoraWeights,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.base_model.qwen_image_21 import GATE_UP, QWEN_IMAGE_21
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

if not hasattr(diffusers, "QwenImage21Transformer2DModel"):
    pytest.skip("this diffusers has no Qwen-Image-2.1", allow_module_level=True)

LINEARS = [
    *(f"transformer_blocks.{i}.{name}" for i in range(2) for name in QWEN_IMAGE_21.block_linears),
    *QWEN_IMAGE_21.top_linears,
]


@pytest.fixture(scope="module")
def transformer():
    """A transformer of two blocks and width 64."""
    torch.manual_seed(0)
    return diffusers.QwenImage21Transformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        context_in_dim=64,
        axes_dims_rope=(4, 14, 14),
    )


def make_adapter(transformer) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for index, path in enumerate(LINEARS):
        out, in_ = transformer.get_submodule(path).weight.shape
        rank, alpha = (4, 2)[index % 2], (6.0, 2.0, 5**0.5)[index % 3]
        lora_A = torch.randn(rank, in_, generator=generator)
        modules[path] = LoraWeights(lora_A, torch.randn(out, rank, generator=generator), alpha)
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
        expected = compute_delta(adapter.modules[path])
        torch.testing.assert_close(expected, change.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("key_format", ["diffusers", "comfyui"])
@pytest.mark.parametrize("is_from_fused", [False, True])
def test_a_file_we_write_has_the_same_effect_in_diffusers(
    key_format, is_from_fused, transformer, tmp_path
):
    adapter = make_adapter(transformer)
    if is_from_fused:
        path = write_adapter(adapter, tmp_path / "fused.safetensors", "kohya", "fused")
        assert any(GATE_UP.replace(".", "_") in key for key in load_file(path))
        given = read_adapter(path)
    else:
        given = adapter
    path = write_adapter(given, tmp_path / "ours.safetensors", key_format)
    assert_same_change(adapter, transformer, load_into(transformer, path))


@pytest.mark.parametrize(
    ("settings", "scale"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 6, "use_rslora": True}, 3.0)]
)
def test_a_file_saved_by_a_pipeline_reads_as_what_it_fuses(settings, scale, transformer, tmp_path):
    """The header says alpha, as in the public files of twice the rank."""
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    model = copy.deepcopy(transformer)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=LINEARS, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    QwenImageLoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    adapter = read_adapter(tmp_path)
    assert (adapter.key_format, adapter.family) == ("diffusers", "qwen-image-2.1")
    assert adapter.report.scales == {scale: len(LINEARS)}
    model.fuse_lora()
    model.unload_lora()
    assert_same_change(adapter, transformer, model)


def test_a_fused_module_acts_as_the_stacked_weight(transformer):
    """gate_up of a fused base is gate_layer above proj: rows of the first half are the gate's."""
    block = transformer.transformer_blocks[0].img_mlp
    torch.manual_seed(2)
    x = torch.randn(3, 64)
    stacked = torch.cat([block.gate_layer.weight, block.proj.weight])
    lora_A, lora_B = torch.randn(2, 64), torch.randn(len(stacked), 2)
    stem = f"diffusion_model.transformer_blocks.0.{GATE_UP}"
    adapter = read_state_dict({f"{stem}.lora_A.weight": lora_A, f"{stem}.lora_B.weight": lora_B})
    gate, up = (x @ (stacked + lora_B @ lora_A).T).chunk(2, dim=-1)
    expected = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, block.out.weight)
    tuned = copy.deepcopy(block)
    with torch.no_grad():
        for name in ("gate_layer", "proj"):
            delta = adapter.modules[f"transformer_blocks.0.img_mlp.{name}"].delta()
            getattr(tuned, name).weight += delta
    torch.testing.assert_close(tuned(x), expected, rtol=1e-4, atol=1e-4)
