"""The VAE of auxiliary losses and samples: shapes, gradients, and invalid VAEs."""

from __future__ import annotations

import pytest
import torch
from demo_base import dit
from demo_base.checkout import ROOT
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.training.data.latents import denormalize
from qwen_edit_lora.lora_core.training.machine.memory import count_bytes
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import LiveBytes
from qwen_edit_lora.lora_core.training.run.trainer import train
from qwen_edit_lora.lora_core.training.sampling import image_decoder
from qwen_edit_lora.lora_core.training.sampling.image_decoder import (
    DECODING_BYTES,
    ImageDecoder,
    load_decoder,
)
from tiny import make_config, make_dataset, make_injected

#: A VAE of the real architecture, narrow and trained.
VAE = ROOT / "tests" / "demo_base" / "weights" / "vae.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A diffusers folder of a tiny VAE of the real architecture."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLQwenImage(base_dim=8, z_dim=16).save_pretrained(folder)
    return folder


def test_an_image_is_what_the_vae_decodes_of_raw_latents_and_gradients_flow(vae):
    from diffusers import AutoencoderKLQwenImage

    decode = load_decoder(vae)
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    image = decode(latents)
    assert image.shape == (2, 3, 32, 48)
    oracle = AutoencoderKLQwenImage.from_pretrained(vae).eval()
    with torch.no_grad():
        expected = oracle.decode(denormalize(latents)[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(image.detach(), (expected / 2 + 0.5).clamp(0, 1))
    image.mean().backward()
    assert latents.grad.abs().max() > 0
    assert all(p.grad is None for p in decode.vae.parameters())


def test_an_image_decoded_in_tiles_is_almost_the_same(monkeypatch):
    monkeypatch.setattr(image_decoder, "TILE", 256)
    monkeypatch.setattr(image_decoder, "TILE_STRIDE", 192)
    coarse = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")
    decode = load_decoder(VAE, dtype=torch.float32)
    with torch.no_grad():
        whole, tiled, again = decode(latents), decode(latents, in_tiles=True), decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 512, 512)
    assert torch.equal(again, whole)  # no tiles are left behind
    difference = (tiled - whole).abs()
    assert difference.max() > 0
    # A tile's attention sees the tile alone; of 255 steps of grey that is 1 on average.
    assert difference.mean() < 1 / 255
    small = latents[..., :16, :16]
    with torch.no_grad():
        assert torch.equal(decode(small, in_tiles=True), decode(small))


def test_a_tile_of_the_real_vae_stays_within_its_estimate():
    from diffusers import AutoencoderKLQwenImage
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda:0"):
                decode = ImageDecoder(AutoencoderKLQwenImage())
        finally:
            torch.set_default_dtype(torch.float32)
        weights = count_bytes(decode.vae.decoder.parameters())
        peaks = {}
        for in_tiles in (False, True):
            latents = torch.zeros(1, 16, 128, 128, device="cuda:0")
            with LiveBytes() as counter:
                decode(latents, in_tiles)
            peaks[in_tiles] = weights + counter.peak
    assert 0.7 * DECODING_BYTES < peaks[True] < DECODING_BYTES
    assert peaks[False] > 3 * peaks[True]


@pytest.mark.parametrize("kind", ["a transformer's file", "an empty folder"])
def test_a_file_that_is_not_a_vae_is_a_clear_error(kind, tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    if kind == "a transformer's file":
        path = dit.write_dit(tmp_path / "dit.safetensors")
    with pytest.raises(FileError, match=r"is not a (VAE of Qwen-Image|folder of Qwen-Image's VAE)"):
        load_decoder(path)


def test_an_auxiliary_loss_on_the_decoded_image_moves_the_lora(vae, tmp_path):
    def darkness(prediction):
        return prediction.image.flatten(1).mean(1)

    dataset, reports = make_dataset(tmp_path / "data"), {}
    for weight in (0.0, 50.0):
        config = make_config(tmp_path / str(weight), steps=1)
        reports[weight], *_ = train(
            *(config, *make_injected(config), dataset),
            auxiliary={"darkness": (darkness, weight)},
            decode=load_decoder(vae),
        )
    without, with_it = reports.values()
    assert with_it.parts["velocity"] == without.parts["velocity"]
    assert 0 < with_it.parts["darkness"] <= 50
    assert with_it.grad_norm != pytest.approx(without.grad_norm, rel=1e-3)
