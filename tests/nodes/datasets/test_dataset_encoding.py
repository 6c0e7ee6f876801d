"""Encoded pairs compared with ComfyUI's own nodes for the same image and prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from demo_base.pair_folders import load_photograph, write_pairs, write_picture
from PIL import Image
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.preflight import check_pairs

pytestmark = pytest.mark.comfy

PLUS, ORIGINAL = "2509 / 2511", "original"
MEGAPIXELS = 0.01
VAE_WIDTH = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(comfyui: SimpleNamespace, demo_models: Any) -> SimpleNamespace:
    """The demo base's CLIP and a VAE a third as wide as its own, from the stock loaders' functions.

    The stock nodes enlarge every reference to a megapixel.
    """
    from demo_base.autoencoder import make_random_weights

    with torch.inference_mode():
        clip = comfyui.sd.load_clip(
            ckpt_paths=[str(demo_models.text_encoder)],
            clip_type=comfyui.sd.CLIPType.QWEN_IMAGE,
        )
        vae = comfyui.sd.VAE(sd=make_random_weights(VAE_WIDTH))
    return SimpleNamespace(clip=clip, vae=vae)


@pytest.fixture
def encoding(comfyui: SimpleNamespace) -> Any:
    from qwen_edit_lora.nodes.datasets import encoding

    return encoding


def check(folder: Path, max_references: int = 3) -> tuple:
    found = find_pairs(folder, lambda path: True)
    checked = check_pairs(found, name="set", megapixels=MEGAPIXELS, max_references=max_references)
    assert checked.stops == ()
    return checked.pairs


def load_image(path: Path) -> torch.Tensor:
    """Loads like ComfyUI's LoadImage."""
    image = Image.open(path).convert("RGB")
    return torch.from_numpy(np.array(image).astype(np.float32) / 255.0)[None]


@torch.inference_mode()
def run_stock(
    models: SimpleNamespace, variant: str, prompt: str, images: list, vae: Any = None
) -> tuple:
    from comfy_extras import nodes_qwen

    if variant == PLUS:
        named = {f"image{i}": image for i, image in enumerate(images, 1)}
        result = nodes_qwen.TextEncodeQwenImageEditPlus.execute(
            models.clip, prompt, vae=vae, **named
        )
    else:
        result = nodes_qwen.TextEncodeQwenImageEdit.execute(
            models.clip, prompt, vae=vae, image=images[0]
        )
    ((text, extra),) = result.result[0]
    return text[0], [latents[0, :, 0] for latents in extra.get("reference_latents", ())]


@pytest.mark.parametrize(("variant", "number"), [(PLUS, 3), (ORIGINAL, 1)])
def test_embedding_and_references_are_the_stock_nodes_own(
    variant, number, models, encoding, tmp_path
):
    folder = write_pairs(tmp_path / "set", 1, reference="control_1/{}.png", width=150, height=90)
    for slot in range(2, number + 1):
        size = (90 + 17 * slot, 120)
        write_picture(load_photograph(slot, *size), folder / f"control_{slot}" / "photo_0.png")
    (checked,) = check(folder)
    encoder = encoding.PairEncoder(models.clip, models.vae, variant, 1.0)
    with torch.inference_mode():
        item = encoder.encode(checked)

    images = [load_image(reference.path) for reference in checked.pair.references]
    text, references = run_stock(models, variant, checked.pair.caption, images, models.vae)
    assert torch.equal(item.text, text)
    assert len(item.references) == len(references) == number
    assert all(map(torch.equal, item.references, references))
    assert all(0 < latents.std() < 100 for latents in references)  # neither constants nor NaN
    empty, _ = run_stock(models, variant, "", images)
    assert torch.equal(item.text_empty, empty)
    assert len(text) > len(empty) > 100 * number  # the images are part of it

    expected = load_image(checked.pair.target.path)
    assert item.target.shape == (16, checked.size[1] // 8, checked.size[0] // 8)
    with torch.inference_mode():
        small = encoding.resize_target(expected, checked.size)
        assert torch.equal(item.target, models.vae.encode(small)[0, :, 0])


@pytest.mark.parametrize("variant", [PLUS, ORIGINAL])
def test_smaller_references_keep_the_prompts_embedding(variant, models, encoding, tmp_path):
    (checked,) = check(write_pairs(tmp_path / "set", 1))
    full = encoding.PairEncoder(models.clip, models.vae, variant, 1.0)
    small = encoding.PairEncoder(models.clip, models.vae, variant, 0.02)
    with torch.inference_mode():
        a, b = full.encode(checked), small.encode(checked)
        # The same path at the stock's size gives what the stock gives.
        image = load_image(checked.pair.references[0].path)
        small.reference_megapixels = 1.0
        again = small._encode_reference(image)
    assert torch.equal(a.text, b.text)
    assert a.references[0].shape == (16, *((105, 157) if variant == PLUS else (104, 156)))
    assert b.references[0].shape == (16, 15, 22)
    if variant == PLUS:
        assert torch.equal(again, a.references[0])


def test_an_empty_caption_is_encoded_once(models, encoding, tmp_path):
    folder = write_pairs(tmp_path / "set", 1)
    (folder / "target" / "photo_0.txt").write_text("")
    (checked,) = check(folder)
    with torch.inference_mode():
        item = encoding.PairEncoder(models.clip, models.vae, PLUS, 0.02).encode(checked)
    assert torch.equal(item.text, item.text_empty)
    assert item.text.data_ptr() != item.text_empty.data_ptr()  # safetensors refuses shared memory


def test_a_mask_weighs_the_latents_it_covers(models, encoding, tmp_path):
    folder = write_pairs(tmp_path / "set", 1)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (48, 0, 96, 64))
    write_picture(mask, folder / "mask" / "photo_0.png")
    (checked,) = check(folder)
    with torch.inference_mode():
        item = encoding.PairEncoder(models.clip, models.vae, PLUS, 0.02).encode(checked)
    height, width = item.target.shape[1:]
    assert item.mask.shape == (height, width)
    assert item.mask.mean() == pytest.approx(0.5)
    assert (item.mask[:, : width // 2] == 0).all()


@pytest.mark.parametrize("size", [(64, 48), (400, 300)])
def test_a_target_is_stretched_to_its_size_without_going_out_of_range(size, encoding):
    image = torch.from_numpy(np.asarray(load_photograph(2, 160, 120)) / np.float32(255))[None]
    resized = encoding.resize_target(image, size)
    assert resized.shape == (1, size[1], size[0], 3)
    assert 0 <= resized.min() < resized.max() <= 1
    assert resized.mean() == pytest.approx(image.mean().item(), abs=0.01)


def test_models_are_distinguished_by_weights_dtypes_and_patches(
    comfyui, models, encoding, demo_models
):
    def identify(vae: Any) -> str:
        return encoding.compute_identity(vae.patcher, str(vae.vae_dtype))

    def load(change: Any = None, **options: Any) -> Any:
        state_dict = comfyui.utils.load_torch_file(str(demo_models.vae))
        if change:
            change(state_dict)
        with torch.inference_mode():
            return comfyui.sd.VAE(sd=state_dict, **options)

    def scale(state_dict: dict) -> None:
        state_dict["decoder.middle.0.residual.0.gamma"] *= 1.1

    known = identify(load())
    assert identify(load()) == known
    assert identify(models.vae) != known
    assert identify(load(scale)) != known
    assert identify(load(dtype=torch.bfloat16)) != identify(load(dtype=torch.float32))

    clip = models.clip
    base = encoding.compute_identity(clip.patcher)
    key = next(k for k in clip.patcher.model_state_dict() if k.endswith("mlp.up_proj.weight"))
    weight = clip.patcher.model_state_dict()[key]
    seen = {base}
    for strength, value in ((0.5, 1.0), (0.6, 1.0), (0.5, 2.0)):
        patched = clip.clone()
        patched.add_patches({key: ("diff", (torch.full_like(weight, value),))}, strength)
        seen.add(encoding.compute_identity(patched.patcher))
        again = clip.clone()
        again.add_patches({key: ("diff", (torch.full_like(weight, value),))}, strength)
        assert encoding.compute_identity(again.patcher) in seen
    assert len(seen) == 4
    assert encoding.compute_identity(clip.patcher) == base


def test_another_clip_or_vae_is_refused_with_a_message(comfyui, models, encoding):
    from comfy.sd1_clip import SD1Tokenizer

    clip = models.clip.clone()
    clip.tokenizer = SD1Tokenizer()
    with pytest.raises(ConfigError, match=r"makes tokens for l; expected Qwen2.5-VL"):
        encoding.check_models(clip, models.vae)
    for name, value in (("latent_channels", 4), ("latent_dim", 2)):
        before = getattr(models.vae, name)
        setattr(models.vae, name, value)
        try:
            with pytest.raises(ConfigError, match="expected 16, 1/8 and 3: load qwen_image_vae"):
                encoding.check_models(models.clip, models.vae)
        finally:
            setattr(models.vae, name, before)
    encoding.check_models(models.clip, models.vae)
