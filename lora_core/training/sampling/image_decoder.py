"""Latents -> images, by diffusers' VAE, from ComfyUI's single file or a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...disk.safetensors_file import SafetensorsFile
from ...errors import FileError
from ...text import shorten
from ..data.latents import DECODER_KEYS, NUM_CHANNELS, denormalize
from ..model.libraries import import_from_diffusers

#: Sides of a tile and of what it adds to its neighbour, in pixels; 64 are blended into each other.
TILE, TILE_STRIDE = 512, 448
#: The VAE's decoding part in bf16, what one tile of it keeps at once (0.84 GiB, counted), and as
#: much as a convolution may want to work in.
DECODING_BYTES = 5 * 2**28


class ImageDecoder:
    """A frozen AutoencoderKLQwenImage; call it with normalised latents. Gradients flow through."""

    def __init__(self, vae: Any):
        self.vae = vae.requires_grad_(False).eval()

    def __call__(self, latents: torch.Tensor, in_tiles: bool = False) -> torch.Tensor:
        """(B, 16, H, W), normalised -> (B, 3, 8H, 8W) in [0, 1], float32.

        Args:
            in_tiles: decode a large image in overlapping parts: a quarter of the memory at
                1024 x 1024, and almost the same image. Without gradients only.
        """
        raw = denormalize(latents).to(next(self.vae.parameters()).dtype)
        if in_tiles:
            self.vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
        else:
            self.vae.disable_tiling()
        image = self.vae.decode(raw[:, :, None], return_dict=False)[0][:, :, 0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


def load_decoder(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ImageDecoder:
    """Reads a VAE, or the decoding part of one; draws no random number.

    Args:
        dtype: to decode in; as stored if None.

    Raises:
        FileError: missing, damaged, or no VAE of Qwen-Image or Wan 2.1.
        ConfigError: diffusers is missing or broken.
    """
    path = Path(path)
    (AutoencoderKLQwenImage,) = import_from_diffusers("AutoencoderKLQwenImage")
    (convert_wan_vae_to_diffusers,) = import_from_diffusers(
        "convert_wan_vae_to_diffusers", module="diffusers.loaders.single_file_utils"
    )
    if path.is_dir():
        try:
            vae = AutoencoderKLQwenImage.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as e:
            raise FileError(
                "{path} is not a folder of Qwen-Image's VAE ({error}).",
                path=shorten(path.name),
                error=shorten(str(e)),
            ) from None
        return ImageDecoder(vae.to(device, dtype))
    file = SafetensorsFile(path, "a VAE")
    tensors = {
        key: tensor.load().clone()
        for key, tensor in file.tensors.items()
        if key.startswith(DECODER_KEYS)
    }
    file.release()
    try:
        if "decoder.conv1.weight" in tensors:  # Wan's names, which ComfyUI keeps
            tensors = convert_wan_vae_to_diffusers(tensors)
        width = tensors["decoder.norm_out.gamma"].shape[0]
        with torch.device("meta"):  # its own weights would be drawn at random
            vae = AutoencoderKLQwenImage(width, NUM_CHANNELS)
        vae.encoder = vae.quant_conv = torch.nn.Identity()
        vae.load_state_dict(tensors, assign=True)
    except (KeyError, RuntimeError):
        raise FileError(
            "{path} is not a VAE of Qwen-Image; expected qwen_image_vae.safetensors or "
            "diffusers' folder of it.",
            path=path.name,
        ) from None
    return ImageDecoder(vae.to(device, dtype or next(iter(tensors.values())).dtype))
