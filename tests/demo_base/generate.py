"""Generates the whole demo base: DiTs, text encoder, VAE and a LoRA under the official file names.

    cd tests; COMFYUI_PATH=... python -m demo_base.generate MODELS_DIRECTORY

The VAE, the DiT and the LoRAs come from `weights`, where training stored them. The text encoder
takes its shapes from ComfyUI's own classes, built small, and is random. The names are the official
ones, so that a workflow made for the real weights runs unchanged.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .dit import METADATA, TEXT_WIDTH, VARIANT_MARKERS, make_dit, make_tensor, write_dit

#: made by train_base.py (the VAE, the DiT) and train_edit.py (the LoRAs)
WEIGHTS = Path(__file__).resolve().parent / "weights"
VAE_WEIGHTS = WEIGHTS / "vae.safetensors"
DIT_WEIGHTS = WEIGHTS / "dit.safetensors"

#: file name -> variant and storage. The fp32 files hold random weights, the others trained ones.
DIT_FILES = {
    "qwen_image_edit_2511_bf16.safetensors": ("2511", "bf16"),
    "qwen_image_edit_2509_bf16.safetensors": ("2509", "bf16"),
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": ("2509", "fp8"),
    "qwen_image_edit_2511_fp8_scaled.safetensors": ("2511", "fp8_scaled"),
    "tiny_fp32_2509.safetensors": ("2509", "fp32"),
    "tiny_fp32_2511.safetensors": ("2511", "fp32"),
}
TEXT_ENCODER_FILE = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
VAE_FILE = "qwen_image_vae.safetensors"
LORA_FILE = "my_edit_lora.safetensors"
#: Checkpoints of the run that LORA_FILE is the last of, and their steps.
RUN_FILES = {f"my_run/my_run-{step:06}.safetensors": step for step in (100, 200, 300)}

VOCABULARY = 151665  # the bundled tokenizer's last id is 151664


def make_text_encoder() -> torch.nn.Module:
    """Qwen2.5-VL, two layers deep and TEXT_WIDTH wide, of ComfyUI's own classes.

    4 heads of 128 stay, since ComfyUI recognises the file by its 512 rows of key bias.
    """
    import comfy.ops
    from comfy.text_encoders import llama, qwen_vl

    build: dict[str, Any] = {
        "device": "meta",
        "dtype": torch.float32,
        "ops": comfy.ops.disable_weight_init,
    }
    config = llama.Qwen25_7BVLI_Config(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    encoder = torch.nn.Module()
    encoder.model = llama.Llama2_(config, **build)
    encoder.visual = qwen_vl.Qwen2VLVisionTransformer(
        hidden_size=64,
        output_hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_heads=2,
        num_layers=2,
        **build,
    )
    return encoder


def fill_state_dict(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random weights for every entry of a module's state dict."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return {key: make_tensor(key, shape, seed) for key, shape in shapes.items()}


def save_bf16(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a state dict as bf16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16() for key, tensor in state_dict.items()}, path, METADATA)


def generate_models(models: Path) -> None:
    """Writes every file of the demo base below ComfyUI's `models` folder."""
    generate_base(models)
    (models / "loras" / "my_run").mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        shutil.copyfile(WEIGHTS / Path(name).name, models / "loras" / name)
    shutil.copyfile(WEIGHTS / Path(name).name, models / "loras" / LORA_FILE)


def generate_base(models: Path) -> None:
    """Writes all but the LoRAs, which are trained on it."""
    trained = {key: tensor.float() for key, tensor in load_file(DIT_WEIGHTS).items()}
    for name, (variant, storage) in DIT_FILES.items():
        markers = {key: torch.tensor([]) for key in VARIANT_MARKERS[variant]}
        weights = make_dit(variant) if storage == "fp32" else trained | markers
        write_dit(models / "diffusion_models" / name, variant, storage, weights)
    text_encoder = fill_state_dict(make_text_encoder(), seed=1)
    save_bf16(text_encoder, models / "text_encoders" / TEXT_ENCODER_FILE)
    save_bf16(load_file(VAE_WEIGHTS), models / "vae" / VAE_FILE)


if __name__ == "__main__":
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    generate_models(Path(sys.argv[1]))
