"""Trains the demo base and writes weights/vae.safetensors and weights/dit.safetensors.

    cd tests; COMFYUI_PATH=... python -m demo_base.train_base [vae] [dit]

Minutes on one core; nothing else runs it: `generate` and the tests load what it wrote. Seeds are
fixed and one thread computes, so that the same torch on the same kind of processor writes the same
weights. Prints the quality of the VAE and the DiT on held-out photographs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import autoencoder, copying
from .checkout import open_checkout
from .dit import METADATA
from .generate import DIT_WEIGHTS, VAE_WEIGHTS
from .lookup import craft_dit
from .photographs import HELD_OUT_CROPS, read_crops

REPORT_EVERY = 100  # steps


def train_vae() -> None:
    """Trains the decoder; the encoder is constructed."""
    vae, pictures = autoencoder.craft_vae()
    autoencoder.use_images(vae)
    held_out = read_crops(HELD_OUT_CROPS, 256)

    def report(step: int, loss: float) -> None:
        if step % REPORT_EVERY == 0:
            with torch.no_grad():
                again = autoencoder.decode(vae, autoencoder.encode(vae, held_out))
            psnr = autoencoder.compute_psnr(held_out, again).tolist()
            say(f"vae {step}: loss {loss:.4f}, held-out PSNR {psnr}")

    autoencoder.train_decoder(vae, pictures, report=report)
    save(vae.state_dict(), VAE_WEIGHTS)


def train_dit() -> None:
    """Trains the DiT to reproduce its first reference; needs the VAE's weights."""
    vae = autoencoder.make_vae("cpu").requires_grad_(False)
    vae.load_state_dict({k: v.float() for k, v in load_file(VAE_WEIGHTS).items()})
    autoencoder.use_images(vae)
    latents = copying.make_latents(vae)
    model = copying.build_dit(craft_dit())

    def report(step: int, loss: float) -> None:
        if step % REPORT_EVERY == 0:
            say(f"dit {step}: loss {loss:.4f}")

    copying.train_copying(model, latents, report=report)
    save(model.transformer.state_dict(), DIT_WEIGHTS)


def save(state_dict: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.bfloat16() for key, tensor in state_dict.items()}, path, METADATA)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    open_checkout()
    for part in sys.argv[1:] or ("vae", "dit"):
        {"vae": train_vae, "dit": train_dit}[part]()
