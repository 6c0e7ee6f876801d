"""An edit to learn: the colours of the blue hour on real photographs, trained by our own engine.

The training set is made as a user would make it, with ComfyUI's VAE and text encoder; the LoRA is
trained by `lora_core.training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .pairs import CONTRAST, DUSK, PROMPT, SATURATION
from .photographs import TRAINING_CROPS, read_crops

SIDE = 128  # pixels of a training image
RANK = 8
BATCH = 4

LUMINANCE = torch.tensor([0.299, 0.587, 0.114])
#: `pairs.DUSK` on a scale from -1 to 1
DUSK_SHIFT = torch.tensor(DUSK) / 127.5


def grade(pictures: torch.Tensor) -> torch.Tensor:
    """`pairs.grade` on tensors, without its rounding; images (n, 3, height, width) in [-1, 1]."""
    luminance = torch.einsum("c,nchw->nhw", LUMINANCE, pictures)[:, None]
    muted = luminance + SATURATION * (pictures - luminance)
    return (CONTRAST * muted + DUSK_SHIFT[:, None, None]).clamp(-1, 1)


def to_image(pictures: torch.Tensor) -> torch.Tensor:
    """(n, 3, height, width) in [-1, 1] to ComfyUI's IMAGE, (n, height, width, 3) in [0, 1]."""
    return (pictures.movedim(1, -1) + 1) / 2


def load_encoders(models: Path) -> tuple[Any, Any]:
    """VAE and CLIP of the demo base from the stock loaders."""
    import comfy.sd
    import comfy.utils

    from . import generate

    with torch.inference_mode():
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / generate.VAE_FILE)))
        clip = comfy.sd.load_clip(
            ckpt_paths=[str(models / "text_encoders" / generate.TEXT_ENCODER_FILE)],
            clip_type=comfy.sd.CLIPType.QWEN_IMAGE,
        )
    return vae, clip


def encode_text(clip: Any, image: torch.Tensor, prompt: str = PROMPT) -> list[Any]:
    """CONDITIONING of a prompt about one IMAGE, by the stock node."""
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus

    return TextEncodeQwenImageEditPlus.execute(clip, prompt, image1=image).result[0]


def write_dataset(
    folder: Path, vae: Any, clip: Any, crops: Any = TRAINING_CROPS, side: int = SIDE
) -> Path:
    """Caches photographs as references and their grades as targets; stock VAE and CLIP objects."""
    from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter

    writer = DatasetWriter(folder)
    pictures = read_crops(crops, side)
    with torch.inference_mode():
        for index, (before, after) in enumerate(zip(pictures, grade(pictures), strict=True)):
            images = [to_image(picture[None]) for picture in (after, before)]
            target, reference = (
                vae.encode(image).reshape(16, side // 8, side // 8) for image in images
            )
            text = encode_text(clip, images[1])[0][0][0]
            item = CachedItem(target.clone(), (reference.clone(),), text.clone())
            writer.add(f"{index:02}", item, PROMPT)
    return writer.finish()


def train_edit(
    source: Path, dataset: Path, output: Path, *, steps: int, name: str = "my_run", every: int = 0
) -> Iterator[Any]:
    """Trains the grade on a DiT file; yields the engine's step reports.

    The finished LoRA is in `output`; every `every` steps one more is in its folder `adapters`.
    """
    from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
    from qwen_edit_lora.lora_core.training.run.session import open_session
    from qwen_edit_lora.lora_core.training.run.trainer import train

    config = config_from_dict(
        {
            "name": name,
            "output": str(output),
            "steps": steps,
            "model": {
                "source": str(source),
                "storage": "fp32",
                "compute_dtype": "fp32",
                "device": "cpu",
                "gradient_checkpointing": False,
            },
            "data": {"folder": str(dataset), "batch_size": BATCH},
            "lora": {"rank": RANK},
            "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "final_factor": 0.1},
            "saving": {"adapter_every": every, "checkpoint_every": steps},
        }
    )
    session = open_session(config)
    yield from train(
        config, session.model, session.injection, session.dataset, variant=session.variant
    )
