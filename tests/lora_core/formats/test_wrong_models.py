"""Adapters of other models: the error names the model, and none of ours is mistaken for one."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import KeyFormatError, read_adapter, read_state_dict, write_adapter
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.formats.architectures import detect_architecture, detect_variants

#: Name expected in the error -> keys as that model's trainers save them, without the suffix.
FOREIGN = {
    "SDXL UNet": [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_proj_in",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    ],
    "SDXL UNet ": ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"],
    "Stable Diffusion 1 or 2 UNet": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ],
    "Flux or HunyuanVideo (diffusers)": [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.ff.net.0.proj",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "transformer.proj_out",
    ],
    "Stable Diffusion 3 or Flux (diffusers)": [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.ff_context.net.2",
    ],
    "Stable Diffusion 3 or Flux (diffusers) ": [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.norm1.linear",
    ],
    "Flux, HunyuanVideo or Chroma": [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_single_blocks_0_linear1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ],
    "Flux, HunyuanVideo or Chroma ": ["diffusion_model.double_blocks.0.img_mod.lin"],
    "Stable Diffusion 3": ["lora_unet_joint_blocks_0_x_block_attn_qkv"],
    "HiDream": ["diffusion_model.double_stream_blocks.0.block.attn1.to_q"],
    "LTX-Video": [
        "diffusion_model.transformer_blocks.0.attn1.to_q",
        "diffusion_model.transformer_blocks.0.ff.net.2",
    ],
    "Wan": ["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"],
    "Wan ": ["lora_unet_blocks_0_cross_attn_k", "lora_unet_blocks_0_ffn_2"],
    "Wan  ": ["transformer.blocks.0.attn1.to_q"],
    "Z-Image": [
        "diffusion_model.layers.0.attention.to_q",
        "diffusion_model.layers.0.feed_forward.w1",
        "diffusion_model.noise_refiner.0.attention.to_q",
    ],
    "a CLIP text encoder": ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"],
    "a text encoder": ["lora_te3_encoder_block_0_layer_0_SelfAttention_q"],
    "a text encoder ": ["text_encoder.encoder.block.0.layer.0.SelfAttention.q"],
    "a language model": ["base_model.model.model.layers.0.self_attn.q_proj"],
}


def make_lora(stems):
    return {
        f"{stem}.lora_{end}.weight": torch.ones(shape)
        for stem in stems
        for end, shape in (("down", (2, 4)), ("up", (4, 2)))
    }


@pytest.mark.parametrize("model", FOREIGN)
def test_the_error_names_the_model_the_file_is_for(model):
    with pytest.raises(KeyFormatError) as caught:
        read_state_dict(make_lora(FOREIGN[model]), name="other.safetensors")
    assert f"its keys are those of {model.strip()}" in str(caught.value)
    assert str(caught.value).endswith("Choose a LoRA trained for Qwen-Image or Qwen-Image-Edit.")


def test_names_shared_with_flux_are_not_a_match():
    shared = r"flux.safetensors shares 6 of 10 keys with Qwen-Image: its keys are those of Flux"
    with pytest.raises(KeyFormatError, match=shared):
        read_state_dict(
            make_lora(FOREIGN["Flux or HunyuanVideo (diffusers)"]), name="flux.safetensors"
        )


@pytest.mark.parametrize("path", [*QWEN_IMAGE.list_module_paths(1), "time_text_embed", "pos_embed"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer.", "lora_unet_"])
def test_no_qwen_image_key_is_mistaken_for_another_model(prefix, path):
    spelled = path.replace(".", "_") if prefix == "lora_unet_" else path
    assert detect_architecture([f"{prefix}{spelled}.weight"]) is None


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa", "OFT"])
@pytest.mark.parametrize("key", ["transformer.transformer_blocks.0.norm1.linear", "lora_te_x"])
def test_a_qwen_file_with_a_stray_key_still_loads(kind, key, make_state_dict):
    state_dict = make_state_dict(modules=["transformer_blocks.0.img_mlp.net.2"], kind=kind)
    adapter = read_state_dict(state_dict | {f"{key}.lora_A.weight": torch.ones(2, 4)})
    assert (len(adapter), len(adapter.report.unmatched)) == (1, 1)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_full_qwen_model_is_recognised(prefix):
    state_dict = {
        f"{prefix}{path}.weight": torch.ones(2, 2) for path in QWEN_IMAGE.list_module_paths(1)
    }
    message = "matches 0 modules.*whole model weights, not an adapter.*Expected keys such as"
    with pytest.raises(KeyFormatError, match=message):
        read_state_dict(state_dict)


def test_a_whole_model_of_another_kind_is_named():
    with pytest.raises(KeyFormatError, match="keys are those of Wan or Cosmos"):
        read_state_dict({"blocks.0.self_attn.q.weight": torch.ones(2, 2)})


def test_unknown_keys_are_reported_with_the_nearest_known_form():
    message = (
        r"matches 0 modules of Qwen-Image with its 2 keys\. .*to_qq.lora_down.weight': names no "
        r"module .* nearest known form is 'transformer_blocks.3.attn.to_q'.*Expected keys such as"
    )
    with pytest.raises(KeyFormatError, match=message):
        read_state_dict(make_lora(["transformer_blocks.3.attn.to_qq"]))


def test_an_unsupported_kind_is_named_although_its_alphas_are_known(make_state_dict):
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    state_dict = {f"{stem}.{part}.weight": torch.ones(2, 2) for part in ("a1", "a2", "b1", "b2")}
    with pytest.raises(KeyFormatError, match="GLoRA, which is not supported"):
        read_state_dict(state_dict | {f"{stem}.alpha": torch.tensor(1.0)})


def test_a_file_of_alphas_alone_matches_nothing():
    with pytest.raises(KeyFormatError, match=r"matches 0 modules.*Only alphas or magnitudes"):
        read_state_dict({"transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("metadata", "file_name", "variants"),
    [
        ({}, "my_style.safetensors", []),
        ({}, "Qwen-Image-Edit-2511-Lightning-4steps.safetensors", ["2511"]),
        ({}, "Qwen-Image-Edit-2509-style.safetensors", ["2509"]),
        ({}, "qwen_image_edit_style.safetensors", []),
        ({"modelspec.architecture": "Qwen-Image-Edit-Plus/lora"}, "x.safetensors", ["2509"]),
        ({"modelspec.architecture": "Qwen-Image/lora"}, "x.safetensors", ["text-to-image"]),
        ({"ss_base_model_version": "qwen_image"}, "x.safetensors", []),
        ({"ss_base_model_version": "qwen_image_edit"}, "edit-2511.safetensors", ["2511"]),
        ({"modelspec.architecture": "Qwen-Image-Edit/lora"}, "2511.safetensors", ["original"]),
        ({"modelspec.architecture": "qwen_image-edit-v1/lora"}, "x.safetensors", ["original"]),
        ({"modelspec.architecture": "qwen_image-edit-v2/lora"}, "x.safetensors", ["2509"]),
        ({"modelspec.architecture": "qwen_image-edit-v2+/lora"}, "x.safetensors", ["2509"]),
        ({"modelspec.architecture": "qwen_image-edit-v3/lora"}, "x.safetensors", ["2511"]),
        ({"modelspec.architecture": "qwen_image-edit-v4/lora"}, "x.safetensors", []),
        ({"modelspec.architecture": "qwen_image/lora"}, "x.safetensors", ["text-to-image"]),
        ({"modelspec.title": "for 2509 and 2511"}, "x.safetensors", ["2511", "2509"]),
        ({}, "my_qwen_image_edit_v2.safetensors", []),
        ({}, "qie2511.safetensors", ["2511"]),
        ({}, "style_2511_v2.safetensors", ["2511"]),
        ({}, "2511-5.safetensors", ["2511"]),
        (
            {"modelspec.architecture": "Qwen-Image-Edit-2511/lora", "modelspec.title": "2509"},
            "x.safetensors",
            ["2511", "2509"],
        ),
    ],
)
def test_variants_are_read_from_the_metadata_then_from_the_file_name(metadata, file_name, variants):
    assert detect_variants(metadata, file_name)[0] == variants


NO_MODELS = [
    "my_style_lora_20251129_072850",
    "run-2025-11-29",
    "run_20250915",
    "style_251129",
    "style_202509",
    "style_000002511",
    "style-step00002509",
    "style_step2511",
    "style-steps-2511",
    "style_2511steps",
    "style_2509_epochs",
    "epoch_2511",
    "checkpoint-2511",
    "seed2509",
    "seed_2511",
    "a1b2511c3",
    "deadbeef2511",
    "12511",
    "25112",
    "style_e2511d",
    "1762511000",
    "32509px",
]


@pytest.mark.parametrize("text", NO_MODELS)
def test_a_number_in_a_date_a_step_or_a_hash_is_not_a_variant(text):
    assert detect_variants({}, f"{text}.safetensors")[0] == []
    assert detect_variants({"modelspec.title": text}, "x.safetensors")[0] == []


@pytest.mark.parametrize("year", range(2024, 2028))
@pytest.mark.parametrize("month", ["09", "11"])
@pytest.mark.parametrize("form", ["{y}{m}29", "{y}-{m}-29", "{y}_{m}_29", "{y}{m}", "{s}{m}29"])
def test_dates_in_september_or_november_are_not_variants(year, month, form):
    date = form.format(y=year, m=month, s=year % 100)
    assert detect_variants({}, f"my_lora_{date}_072850.safetensors")[0] == []


def test_step_counts_in_training_info_are_not_variants():
    metadata = {"training_info": '{"step": 2511, "epoch": 2509}'}
    assert detect_variants(metadata, "x.safetensors")[0] == []


def test_every_claim_about_the_variant_states_its_source():
    hints = detect_variants({"modelspec.title": "Style 2511"}, "style-2511.safetensors")[1]
    assert hints == [
        "made for 2511, says metadata modelspec.title: Style 2511",
        "made for 2511, says the file name: style-2511.safetensors",
    ]


@pytest.mark.parametrize(
    ("num_blocks", "preset", "hinted"),
    [(19, "attention", True), (60, "attention", False), (19, "full", False)],
)
def test_a_file_that_also_fits_flux_is_reported(num_blocks, preset, hinted):
    state_dict = {}
    for block in range(num_blocks):
        for name in QWEN_IMAGE.presets[preset]:
            out, in_ = QWEN_IMAGE.compute_shape(name)
            stem = f"transformer.transformer_blocks.{block}.{name}"
            state_dict[f"{stem}.lora_A.weight"] = torch.zeros(1, in_)
            state_dict[f"{stem}.lora_B.weight"] = torch.zeros(out, 1)
    hints = read_state_dict(state_dict).report.hints
    assert any("would fit Flux as well" in hint for hint in hints) == hinted


def test_writing_does_not_invent_a_variant(tmp_path, make_state_dict):
    adapter = read_state_dict(make_state_dict())
    path = write_adapter(adapter, tmp_path / "plain.safetensors")
    assert read_adapter(path).report.variants == ()
