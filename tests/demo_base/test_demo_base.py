"""The demo base is what the other tests assume it to be."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from demo_base import adapters, dit, edit, pairs


def make_graph(dit_name, lora_strength):
    """An edit at 64 x 64 through stock nodes only, in API form."""

    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    sampling = {"seed": 1, "steps": 4, "cfg": 1.0, "denoise": 1.0}
    sampling |= {"sampler_name": "euler", "scheduler": "simple"}
    return {
        "dit": node("UNETLoader", unet_name=dit_name, weight_dtype="default"),
        "te": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "load": node("LoadImage", image="example.png"),
        "image": node(
            "ImageScale",
            image=["load", 0],
            upscale_method="area",
            width=64,
            height=64,
            crop="disabled",
        ),
        "latent": node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        "text": node(
            "TextEncodeQwenImageEditPlus",
            clip=["te", 0],
            prompt="make it blue",
            image1=["image", 0],
        ),
        "cond": node("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0]),
        "lora": node(
            "LoraLoaderModelOnly",
            model=["dit", 0],
            lora_name="my_edit_lora.safetensors",
            strength_model=lora_strength,
        ),
        "sample": node(
            "KSampler",
            model=["lora", 0],
            positive=["cond", 0],
            negative=["cond", 0],
            latent_image=["latent", 0],
            **sampling,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="demo_base"),
    }


def render(server, dit_name, lora_strength):
    """The edited image as float32 (64, 64, 3)."""
    entry = server.run_prompt(make_graph(dit_name, lora_strength))
    return np.asarray(Image.open(io.BytesIO(server.images(entry)[0])), dtype=np.float32)


@pytest.mark.comfy
@pytest.mark.parametrize("variant", sorted(dit.VARIANT_MARKERS))
def test_the_tiny_dit_has_exactly_the_keys_of_comfyuis_class(comfyui, variant):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        num_layers=dit.NUM_BLOCKS,
        attention_head_dim=dit.HEAD_WIDTH,
        num_attention_heads=dit.NUM_HEADS,
        joint_attention_dim=dit.TEXT_WIDTH,
        axes_dims_rope=dit.ROPE_AXES,
        default_ref_method="index_timestep_zero" if variant == "2511" else "index",
        operations=comfyui.ops.disable_weight_init,
    )
    model.load_state_dict(dit.make_dit(variant), strict=True)


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("name", "variant", "weight_type"),
    [
        ("2509_fp32", "index", torch.float32),
        ("2511_fp32", "index_timestep_zero", torch.float32),
        ("2509_bf16", "index", torch.bfloat16),
        ("2511_bf16", "index_timestep_zero", torch.bfloat16),
        ("2509_fp8", "index", torch.float8_e4m3fn),
        ("2511_fp8_scaled", "index_timestep_zero", None),
    ],
)
def test_every_storage_loads_as_its_name_says(comfyui, demo_models, name, variant, weight_type):
    from comfy.quant_ops import QuantizedTensor

    # on a CPU ComfyUI widens bf16 and plain fp8 files to float32, unless given the dtype
    options = {} if weight_type is None else {"dtype": weight_type}
    with torch.inference_mode():
        patcher = comfyui.sd.load_diffusion_model(str(demo_models.dit[name]), options)
    model = patcher.model.diffusion_model
    weight = model.transformer_blocks[0].attn.to_q.weight
    assert model.default_ref_method == variant
    if weight_type is None:
        assert isinstance(weight, QuantizedTensor)
    else:
        assert weight.dtype == weight_type


@pytest.mark.comfy
def test_a_server_edits_on_every_dit_and_the_lora_changes_the_image(server, demo_models):
    for path in demo_models.dit.values():
        before, after = (render(server, path.name, strength) for strength in (0.0, 1.0))
        assert np.abs(after - before).mean() > 0.1, path.name


def compute_psnr(picture, other):
    """Of values in 0 to 255, in dB."""
    return 20 * np.log10(255 / np.sqrt(np.square(picture - other).mean()))


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["2509_bf16", "2511_bf16", "2509_fp8", "2511_fp8_scaled"])
def test_the_trained_base_reproduces_an_unseen_photograph_and_the_lora_makes_it_blue(
    server, demo_models, base_directory, name
):
    photo = Image.open(base_directory / "input" / "example.png").resize(
        (64, 64), Image.Resampling.BOX
    )
    photo = np.asarray(photo, dtype=np.float32)
    before, half, after = (
        render(server, demo_models.dit[name].name, strength) for strength in (0.0, 0.5, 1.0)
    )
    pixels = torch.from_numpy(photo).movedim(-1, 0)[None] / 127.5 - 1
    wanted = (edit.grade(pixels)[0].movedim(0, -1).numpy() + 1) * 127.5
    figures = {
        "before": compute_psnr(before, photo),
        "ungraded": compute_psnr(before, wanted),
        "after": compute_psnr(after, wanted),
    }
    assert figures["before"] > 22, figures
    assert figures["after"] > figures["ungraded"] + 3, figures  # half the error
    red, blue = (np.diff(np.stack([before, after])[..., i].mean((1, 2)))[0] for i in (0, 2))
    assert red < -10, red
    assert blue > 10, blue
    assert np.abs(half - (before + after) / 2).mean() < 10


@pytest.mark.comfy
def test_a_refused_graph_raises_with_the_node_named(server):
    from demo_base.server import PromptError

    with pytest.raises(PromptError, match=r"node dit \(UNETLoader\).*absent.safetensors"):
        server.run_prompt(make_graph("absent.safetensors", 1.0))


@pytest.mark.parametrize("key_style", sorted(adapters.KEY_STYLES))
def test_a_generated_adapter_has_the_requested_delta(tmp_path, key_style):
    path = adapters.make_adapter(
        tmp_path / "lora.safetensors",
        {"transformer_blocks.0.attn.to_q": (512, 256)},
        delta_std=1e-3,
        alpha=4.0,
        key_style=key_style,
        dtype=torch.float32,
    )
    state_dict = load_file(path)
    lora_A, lora_B = (
        next(tensor for key, tensor in state_dict.items() if any(s in key for s in names))
        for names in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
    )
    delta = 4.0 / 8 * lora_B @ lora_A
    assert delta.std().item() == pytest.approx(1e-3, rel=0.2)


def test_targets_read_from_a_file_equal_the_table(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp8_scaled")
    assert adapters.read_targets(path) == dit.list_lora_targets()
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["tiny_demo"] == "true"


@pytest.mark.web
def test_the_page_opens_in_a_browser(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
    assert page.evaluate("'KSampler' in LiteGraph.registered_node_types")
    page.close()


def test_the_grades_of_images_and_of_tensors_are_equal():
    with Image.open(Path(pairs.__file__).with_name("photo.jpg")) as photo:
        before = photo.convert("RGB").resize((64, 64))
    after = np.asarray(pairs.grade(before), dtype=np.float32)
    tensor = torch.from_numpy(np.asarray(before, dtype=np.float32)).movedim(-1, 0)[None]
    graded = (edit.grade(tensor / 127.5 - 1)[0].movedim(0, -1).numpy() + 1) * 127.5
    assert np.abs(after - np.asarray(before)).mean() > 20
    assert np.abs(graded - after).max() <= 2  # Pillow rounds on the way
