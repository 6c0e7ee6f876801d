"""The names that a run gives its files: taken by nothing but the run itself."""

from __future__ import annotations

import os
from pathlib import Path

from ...disk.output_files import is_same
from ...disk.safetensors_file import SafetensorsFile
from ...errors import ConfigError, FileError
from ...text import name_path
from ..config.config import TrainConfig
from .adapter_files import ADAPTERS, CONFIG_KEY, EMA_SUFFIX, list_step_adapters, write_config
from .checkpoint import CHECKPOINTS, CheckpointFolder


def open_checkpoints(config: TrainConfig) -> CheckpointFolder:
    return CheckpointFolder(Path(config.output) / CHECKPOINTS, config.saving.keep_checkpoints)


def check_is_free(config: TrainConfig, resume: bool) -> None:
    """Raises ConfigError if the run would replace another one, its own model, or anyone's LoRA."""
    checkpoints = open_checkpoints(config)
    steps = checkpoints.list_steps()
    if steps and not resume:
        raise ConfigError(
            "{folder_parent} already holds a run up to step {steps}; resume it, or choose "
            "another output folder",
            folder_parent=checkpoints.folder.parent.name,
            steps=steps[-1],
        )
    folder, name = checkpoints.folder.parent, config.name
    was_started = checkpoints.folder.is_dir()  # every run makes it before its first step
    finished = [folder / f"{name}{suffix}.safetensors" for suffix in ("", EMA_SUFFIX)]
    found = [file for file in finished if os.path.lexists(file)]
    if resume and was_started:
        found = [file for file in found if not is_own(file, config, checkpoints)]
    if not was_started:  # of a killed run they may be older than the first checkpoint
        found += [path for _, path in list_step_adapters(folder / ADAPTERS, name)]
    sources = [source for source in (config.model.source, config.model.vae) if source]
    found += [file for file in finished if any(is_same(file, source) for source in sources)]
    if found:
        raise ConfigError(
            "{found} is already in {parent} and would be replaced by this run; choose another "
            "name or output folder",
            found=name_path(found[0]),
            parent=name_path(found[0].parent),
        )


def is_own(finished: Path, config: TrainConfig, checkpoints: CheckpointFolder) -> bool:
    """Whether a resumed run may replace this LoRA: it has the run's name since its last checkpoint.

    Under a name that was changed since then, the file is an earlier LoRA of the folder, unless
    this very command made it.
    """
    run = (checkpoints.read_newest_state() or {}).get("run", {})
    if run.get("config", {}).get("name", config.name) == config.name:
        return True
    try:
        return SafetensorsFile(finished).metadata.get(CONFIG_KEY) == write_config(config)
    except FileError:
        return False
