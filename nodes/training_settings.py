"""Turns the Train node's inputs into one configuration of the training engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..lora_core import ConfigError
from ..lora_core.disk.safetensors_file import read_signature
from ..lora_core.errors import get_reason
from ..lora_core.training.config.config import TrainConfig
from ..lora_core.training.config.config_files import config_from_dict, config_to_dict, parse
from ..lora_core.training.config.presets import apply_preset, merge_tables
from ..lora_core.training.data.dataset import INDEX_FILE

#: Means "as in the preset" in a number widget.
AS_PRESET = 0
AS_PRESET_CHOICE = "as the preset"
AUTO = "auto"
#: A placeholder that the engine replaces.
OUTPUT = "set by the job"
MORE_SETTINGS = Path("more_settings.toml")


def build_config(
    model: Path,
    dataset_folder: Path,
    name: str,
    preset: str,
    *,
    steps: int,
    base: Mapping[str, Any],
    chosen: Mapping[str, Any],
    more_settings: str,
) -> TrainConfig:
    """The run's configuration: preset, then the inputs that are set, then `more_settings`.

    Args:
        base: `ModelConfig.storage` and the other settings of how the base is stored.
        chosen: "table.setting" -> value; ignored if it is AS_PRESET, AS_PRESET_CHOICE or None.
        more_settings: TOML text with the same tables as a configuration file.

    Raises:
        ConfigError: a value out of range, an unknown setting, or invalid TOML.
    """
    values: dict[str, Any] = {
        "name": name.strip(),
        "output": OUTPUT,
        "steps": steps,
        "model": {"source": str(model), **base},
        "data": {"folder": str(dataset_folder)},
    }
    for place, value in chosen.items():
        if value not in (None, AS_PRESET_CHOICE) and value != AS_PRESET:
            table, _, setting = place.rpartition(".")
            (values.setdefault(table, {}) if table else values)[setting] = value
    values = merge_tables(apply_preset(preset, values), read_more(more_settings))
    return config_from_dict(values)


def read_more(text: str) -> dict[str, Any]:
    """The tables of a TOML text; refuses what the node's other inputs or the job decide.

    Raises:
        ConfigError: invalid TOML, or it sets the model's file, the training set or the output.
    """
    if not text.strip():
        return {}
    try:
        values = parse(text, MORE_SETTINGS)
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(
            "more_settings cannot be read ({error}); expected TOML such as '[objective]' and in "
            "the next line 'sampling = \"uniform\"'",
            error=e,
        ) from None
    for table, setting in ((None, "output"), ("model", "source"), ("data", "folder")):
        found = values if table is None else values.get(table)
        if isinstance(found, Mapping) and setting in found:
            raise ConfigError(
                "more_settings names {setting}, which the node's own inputs decide; remove it",
                setting=setting,
            )
    return values


def compute_key(config: TrainConfig) -> str:
    """Equal for equal runs: a hash of all settings, the model's file, the training set's index."""
    values = config_to_dict(config)
    values["output"] = ""
    values["model"]["signature"] = [str(part) for part in read_signature(Path(config.model.source))]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    try:
        digest.update((Path(config.data.folder) / INDEX_FILE).read_bytes())
    except OSError as e:
        raise ConfigError(
            "the training set cannot be opened ({reason}); run the dataset node again",
            reason=get_reason(e),
        ) from None
    return digest.hexdigest()
