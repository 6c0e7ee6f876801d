"""A job before it is one: its settings built and changed, its folder made whole."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import show
from ..disk.writing import explain, rename
from ..errors import ConfigError, FileError
from ..training.config.config import TrainConfig
from ..training.config.config_files import build, config_to_dict
from .folder import JobFolder
from .job import JobSettings, JobState, check_id
from .publication import remove_unfinished, try_folder


def build_settings(train: TrainConfig, **settings: Any) -> JobSettings:
    """
    Args:
        settings: further fields of `JobSettings`.

    Raises:
        ConfigError: they are invalid.
    """
    values = {
        name: config_to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, value in settings.items()
    }
    return build(JobSettings, {"train": config_to_dict(train), **values}, "")


def change_settings(settings: JobSettings, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain data, with changes by dotted name; their values are not checked here.

    Raises:
        ConfigError: no setting is called that.
    """
    values = config_to_dict(settings)
    own = {name for name in values if name not in ("train", "key")}
    for name, value in changes.items():
        *sections, last = name.split(".")
        table = values if (sections or [last])[0] in own else values["train"]
        for section in sections:
            if not isinstance(table.get(section), dict):
                raise ConfigError("there is no setting {name}", name=show(name))
            table = table[section]
        table[last] = value
    return values


def write_job(path: Path, settings: JobSettings, state: JobState) -> None:
    """Makes the job's folder, under another name until it is whole.

    Raises:
        FileError: the disk does not take it, or its loras folder is no place to write.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.mkdir()
        folder = JobFolder(temporary)
        folder.write_settings(settings)
        if settings.loras:  # now, so that a leftover trial file is found by the settings
            try_folder(Path(settings.loras), path.name)
        folder.write_state(state)
        rename(temporary, path)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(e, OSError):
            raise
        raise FileError("the job cannot be written: {reason}", reason=explain(e)) from None


def remove_traces(leftover: Path) -> None:
    """Removes what a half-submitted or half-deleted job left in its loras folder."""
    try:
        job_id = check_id(leftover.name.split(".")[1])
        loras = JobFolder(leftover).read_settings().loras
    except (ConfigError, FileError):
        return
    if loras:
        remove_unfinished(Path(loras), job_id)
