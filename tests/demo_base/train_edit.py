"""Trains the demo LoRA with our engine and writes its checkpoints into weights/.

    cd tests; COMFYUI_PATH=... python -m demo_base.train_edit

About a minute on one core; the base must have been trained (train_base.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import edit, generate
from .checkout import open_checkout

#: 2509 has references at the target's noise level, so that the LoRA works at every level, on 2511
#: too; the reverse fails at few steps
LORA_BASE = "qwen_image_edit_2509_bf16.safetensors"
TIMES = ("modelspec.date", "modelspec.hash_sha256")  # differ from run to run
#: Say 2509 only; the demo DiT has the same weights under both names.
CLAIMS = ("modelspec.architecture", "ss_sd_model_name")


def train_demo_lora() -> None:
    """Writes weights/my_run-<step>.safetensors."""
    steps = sorted(generate.RUN_FILES.values())
    with tempfile.TemporaryDirectory() as folder:
        models, output = Path(folder) / "models", Path(folder) / "my_run"
        generate.generate_base(models)
        dataset = edit.write_dataset(Path(folder) / "dataset", *edit.load_encoders(models))
        source = models / "diffusion_models" / LORA_BASE
        for report in edit.train_edit(source, dataset, output, steps=steps[-1], every=steps[0]):
            if report.step % 20 == 0:
                print(f"{report.step}: loss {report.smoothed_loss:.4f}", flush=True)
        for name, step in generate.RUN_FILES.items():
            keep(output / "adapters" / f"my_run_{step:08}.safetensors", Path(name).name)


def keep(trained: Path, name: str) -> None:
    """Copies a LoRA into weights/ without the metadata that differs between trainings."""
    with safe_open(trained, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k not in TIMES + CLAIMS}
    save_file(load_file(trained), generate.WEIGHTS / name, metadata)


if __name__ == "__main__":
    torch.set_num_threads(1)
    open_checkout()
    train_demo_lora()
