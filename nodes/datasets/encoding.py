"""Pair -> latents and embeddings, exactly as ComfyUI's own encoding nodes make them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...lora_core import ConfigError, LoraError
from ...lora_core.messages import message
from ...lora_core.pairs.preflight import CheckedPair
from ...lora_core.pairs.sizes import Size, check_megapixels, choose_reference_size
from ...lora_core.pairs.vae_copy import keep_vae
from ...lora_core.training.data.dataset import CachedItem
from ...lora_core.training.data.latents import NUM_CHANNELS, PIXELS_PER_LATENT
from .. import host

STOCK_REFERENCE_MEGAPIXELS = 1.0  # 1024 x 1024, in the stock nodes
TEXT_ENCODER = "qwen25_7b"  # the tokens' name in comfy/text_encoders/qwen_image.py
FALLBACK_TEXT_WIDTH = 3584
NUM_SAMPLES = 16  # values per weight that go into the identity
SMALL_BYTES = 4096  # a weight up to this size is read whole


@dataclass(frozen=True)
class Variant:
    """How a model family is prompted."""

    stock_class: str
    image_inputs: tuple[str, ...]


VARIANTS = {
    "2509 / 2511": Variant("TextEncodeQwenImageEditPlus", ("image1", "image2", "image3")),
    "original": Variant("TextEncodeQwenImageEdit", ("image",)),
}


class PairEncoder:
    """Encodes pairs one by one with one CLIP and VAE.

    Raises:
        ConfigError: they are not Qwen-Image's, or the references' area is not a number.
    """

    def __init__(self, clip: Any, vae: Any, variant: str, reference_megapixels: float):
        check_models(clip, vae)
        check_megapixels(reference_megapixels, "reference_megapixels")
        self.clip = clip
        self.vae = vae
        self.variant = VARIANTS[variant]
        self.reference_megapixels = reference_megapixels
        self._stock = host.get_stock_encoder(self.variant.stock_class)

    @property
    def settings(self) -> dict[str, object]:
        """What the encoding depends on besides the pair itself."""
        source = inspect.getsource(self._stock)
        template = inspect.getsource(type(self.clip.tokenizer))
        return {
            "stock_node": self.variant.stock_class,
            "stock_code": hashlib.blake2b((source + template).encode(), digest_size=8).hexdigest(),
            "reference_megapixels": self.reference_megapixels,
            "clip": compute_identity(
                self.clip.patcher, self.clip.layer_idx, get_options(self.clip)
            ),
            "vae": compute_identity(self.vae.patcher, str(self.vae.vae_dtype)),
        }

    def keep_vae(self, store: Path, identity: str) -> str:
        """Copies the VAE's decoder beside the sets, for the sample images of trainings.

        Args:
            identity: the VAE's identity in `settings`.

        Returns:
            Why that was not possible, for the report; "" if it was.
        """
        try:
            if self.vae.patcher.patches:
                raise ConfigError("it is patched")
            keep_vae(store, identity, host.list_weights(self.vae.patcher))
        except LoraError as e:
            return message(
                "trainings will show no sample images, since the VAE cannot be kept: {error}",
                error=e,
            )
        return ""

    @property
    def text_width(self) -> int:
        weights = host.list_weights(self.clip.patcher)
        return next(
            (tensor.shape[1] for name, tensor in weights if name.endswith("embed_tokens.weight")),
            FALLBACK_TEXT_WIDTH,
        )

    def encode(self, checked: CheckedPair) -> CachedItem:
        """Encodes one item; interruptible between its parts.

        References are read at full size, 12 bytes per pixel: the stock node downscales each twice
        from the original, for the text encoder and the VAE; a smaller image changes the bits.
        """
        pair = checked.pair
        images = [to_image(reference.read()) for reference in pair.references]
        is_stock_size = self.reference_megapixels == STOCK_REFERENCE_MEGAPIXELS
        text, latents = self._encode_prompt(
            pair.caption or "", images, self.vae if is_stock_size else None
        )
        if not is_stock_size:
            latents = [self._encode_reference(image) for image in images]
        host.raise_if_interrupted()
        text_empty = text.clone() if not pair.caption else self._encode_prompt("", images)[0]
        host.raise_if_interrupted()
        del images
        target = self._encode_image(resize_target(to_image(pair.target.read()), checked.size))
        mask = None
        if pair.mask is not None:
            height, width = target.shape[-2:]
            mask = resize_mask(pair.mask.read(), (height, width))
        return CachedItem(
            target=target,
            references=tuple(latents),
            text=text,
            text_empty=text_empty,
            mask=mask,
        )

    def _encode_prompt(
        self, prompt: str, images: list[torch.Tensor], vae: Any = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Encodes with the stock node: (tokens, width) and the latents of the references."""
        named = dict(zip(self.variant.image_inputs, images, strict=False))
        conditioning = self._stock.execute(self.clip, prompt, vae=vae, **named).result[0]
        if len(conditioning) != 1:
            raise ConfigError(
                "the CLIP gives {count} embeddings for one prompt, as scheduled LoRA "
                "hooks on it do; connect the CLIP without hooks",
                count=len(conditioning),
            )
        ((text, extra),) = conditioning
        text = text[0]
        mask = extra.get("attention_mask")
        if mask is not None:
            text = text[mask[0].bool()]
        return text, [get_latents(latents) for latents in extra.get("reference_latents", [])]

    def _encode_reference(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:3]
        size = choose_reference_size(width, height, self.reference_megapixels)
        return self._encode_image(host.scale_area(image, *size))

    def _encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return get_latents(self.vae.encode(image))


def check_models(clip: Any, vae: Any) -> None:
    tokens = clip.tokenize("")
    if TEXT_ENCODER not in tokens:
        raise ConfigError(
            "the CLIP makes tokens for {tokens}; expected Qwen2.5-VL: load qwen_2.5_vl_7b with "
            "CLIPLoader, type qwen_image",
            tokens=", ".join(tokens),
        )
    # Wan 2.1's VAE has the same architecture; what it was trained on cannot be determined.
    kind = (vae.latent_channels, vae.latent_dim, vae.spacial_compression_encode())
    if kind != (NUM_CHANNELS, 3, PIXELS_PER_LATENT):
        raise ConfigError(
            "the VAE makes latents of {found_channels} channels at 1/{downscale} of the size in "
            "{num_dimensions} dimensions; expected {num_channels}, 1/{pixels_per_latent} and 3: "
            "load qwen_image_vae",
            found_channels=kind[0],
            downscale=kind[2],
            num_dimensions=kind[1],
            num_channels=NUM_CHANNELS,
            pixels_per_latent=PIXELS_PER_LATENT,
        )


def get_latents(latents: torch.Tensor) -> torch.Tensor:
    """(1, 16, 1, h, w) from the VAE -> (16, h, w)."""
    return latents[0, :, 0] if latents.ndim == 5 else latents[0]


def to_image(pixels: np.ndarray) -> torch.Tensor:
    """float32 (height, width, 3) -> an IMAGE with a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(pixels))[None]


def resize_target(image: torch.Tensor, size: Size) -> torch.Tensor:
    """(1, h, w, 3) -> (1, height, width, 3).

    Downscaled like the references, so that what a pair leaves unchanged is equal in both. Area
    averaging cannot upscale; that is bicubic.
    """
    width, height = size
    if width <= image.shape[2] and height <= image.shape[1]:
        return host.scale_area(image, width, height)
    scaled = F.interpolate(image.movedim(-1, 1), size=(height, width), mode="bicubic")
    return scaled.clamp(0, 1).movedim(1, -1)


def resize_mask(pixels: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """float32 (h, w, 3) -> loss weights of the latents, (height, width) in [0, 1]."""
    grey = torch.from_numpy(pixels.mean(axis=2))
    return F.interpolate(grey[None, None], size=tuple(size), mode="area")[0, 0]


# --- which CLIP, which VAE ------------------------------------------------------------------------


def get_options(clip: Any) -> str:
    return repr(sorted(clip.tokenizer_options.items()))


def compute_identity(patcher: host.ModelPatcher, *more: object) -> str:
    """A digest that identifies a loaded model: names, shapes, dtypes, and some bytes.

    Covers every weight as loaded, so that the file's name and location do not matter, and every
    patch on it. Does not read all weights: a text encoder has 15 GB.
    """
    digest = hashlib.blake2b(repr(more).encode(), digest_size=12)
    for name, tensor in sorted(host.list_weights(patcher)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample_bytes(tensor))
    for key in sorted(map(str, patcher.patches)):
        digest.update(key.encode())
        for piece in list_pieces(patcher.patches.get(key)):
            digest.update(piece)
    return digest.hexdigest()


def sample_bytes(tensor: torch.Tensor) -> bytes:
    """Values spread over a tensor, as bytes; empty for a tensor without data."""
    tensor = getattr(tensor, "_qdata", tensor).detach()  # of comfy-kitchen's QuantizedTensor
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    numbers = flat.reshape(-1).view(torch.uint8).reshape(tensor.numel(), -1)
    # Odd, so that the samples are not all in one column of a matrix.
    step = 1 if tensor.nbytes <= SMALL_BYTES else (len(numbers) // NUM_SAMPLES) | 1
    return numbers[::step].cpu().numpy().tobytes()


def list_pieces(value: Any) -> Iterator[bytes]:
    """The parts of a patch: numbers, names and tensors, at any nesting depth."""
    if isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        yield sample_bytes(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from list_pieces(part)
    elif value is None or isinstance(value, (str, int, float)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
        yield from list_pieces(getattr(value, "weights", None))
