"""The adapters a run writes: raw and averaged, self-contained, loadable anywhere."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...adapter.adapter import Adapter
from ...disk.own_folders import check_own_folder
from ...errors import FileError
from ...formats.architectures import ARCHITECTURES
from ...formats.files import write_adapter
from ...formats.schemes import CONFIG_KEY
from ...text import shorten
from ..config.config import TrainConfig
from ..config.config_files import config_to_dict
from ..data.dataset import CachedDataset
from ..data.latents import PIXELS_PER_LATENT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADAPTERS = "adapters"
EMA_SUFFIX = "_ema"
#: In an adapter's metadata: everything that its run was asked for, as JSON without paths.


def build_run_metadata(
    config: TrainConfig, dataset: CachedDataset, step: int, variant: str | None, is_ema: bool
) -> dict[str, str]:
    """An adapter's metadata for other programs and people (modelspec 1.0.0, kohya's ss_*).

    Rank, alpha and the architecture's other fields are added by `write_adapter`. Paths are left
    out: they mean nothing on another machine, and reveal where users keep their files.

    Args:
        variant: "original", "2509" or "2511"; None where it is not known.
    """
    sizes = sorted({info.target for info in dataset.items})
    epochs = step * config.optimizer.accumulation * config.data.batch_size / len(dataset)
    metadata = {
        "modelspec.title": config.name + (" (EMA)" if is_ema else ""),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.prediction_type": "velocity",
        "modelspec.resolution": ", ".join(format_size(size) for size in sizes[:8]),
        "ss_output_name": config.name,
        "ss_sd_model_name": Path(config.model.source).name,
        "ss_base_model_version": "qwen_image",
        "ss_steps": str(step),
        "ss_epoch": f"{epochs:.2f}",
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(dataset)),
        "ss_learning_rate": f"{config.optimizer.learning_rate:g}",
        "ss_lr_scheduler": config.optimizer.schedule,
        "ss_optimizer": config.optimizer.name,
        "ss_gradient_accumulation_steps": str(config.optimizer.accumulation),
        "ss_batch_size_per_device": str(config.data.batch_size),
        "ss_mixed_precision": config.model.compute_dtype,
        CONFIG_KEY: write_config(config),
    }
    if variant in ARCHITECTURES:
        metadata["modelspec.architecture"] = ARCHITECTURES[variant]
    return metadata


def write_config(config: TrainConfig) -> str:
    """What `CONFIG_KEY` holds."""
    return json.dumps(strip_paths(config_to_dict(config)), sort_keys=True)


def strip_paths(config: dict) -> dict:
    """Folder names are reduced to their last part."""
    config = json.loads(json.dumps(config))
    for table, names in ((config, ["output"]), (config["model"], ["source", "vae"])):
        table.update({name: Path(table[name]).name for name in names})
    data = config["data"]
    data.update({name: Path(data[name]).name for name in ("folder", "prior")})
    return config


def format_size(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width * PIXELS_PER_LATENT}x{height * PIXELS_PER_LATENT}"


def write_adapters(
    adapters: Mapping[str, Adapter], folder: Path, name: str, step: int | None, keep: int
) -> tuple[str, ...]:
    """Writes adapters of one step and deletes older steps' beyond `keep` (0 keeps all).

    Args:
        adapters: suffix of the file's name ("" or "_ema") -> adapter.
        step: None for the finished ones, which are in the run's folder without a number.

    Returns:
        Paths relative to `folder`.

    Raises:
        FileError: they cannot be written, the folder of a step's is a link, or `folder` is
            missing: it is never created again.
    """
    if not folder.is_dir():
        raise FileError(
            "{folder} was removed; nothing is written to it.", folder=shorten(folder.name)
        )
    if step is not None:
        check_own_folder(folder / ADAPTERS)
    written = []
    for suffix, adapter in adapters.items():
        if step is None:
            path = folder / f"{name}{suffix}.safetensors"
        else:
            path = folder / ADAPTERS / f"{name}_{step:08d}{suffix}.safetensors"
        write_adapter(adapter, path)
        written.append(path.relative_to(folder).as_posix())
    if step is not None and keep:
        remove_older(folder / ADAPTERS, name, keep)
    return tuple(written)


def list_step_adapters(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Adapters of earlier steps with the step in their names; none if there is no such folder."""
    pattern = re.compile(rf"{re.escape(name)}_([0-9]{{8,}})(?:{EMA_SUFFIX})?\.safetensors")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = [(pattern.fullmatch(path.name), path) for path in paths]
    return [(int(match[1]), path) for match, path in matches if match]


def remove_older(folder: Path, name: str, keep: int) -> None:
    by_step: dict[int, list[Path]] = {}
    for step, path in list_step_adapters(folder, name):
        by_step.setdefault(step, []).append(path)
    for step in sorted(by_step)[:-keep]:
        for path in by_step[step]:
            with contextlib.suppress(OSError):  # a leftover is no reason to end a run
                path.unlink()
