"""Training an adapter again from its own metadata: same settings, same base, same training set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..disk.json_reader import parse_object
from ..errors import ConfigError, FileError
from ..messages import join_messages, message, take_clause
from ..text import shorten
from ..training.config.config import TrainConfig
from ..training.config.config_files import config_from_dict
from ..training.run.adapter_files import CONFIG_KEY

#: A file's or folder's own name -> where it is: nothing, one place, or several.
Find = Callable[[str], Sequence[Path]]

MAX_NAME = 300
#: Characters of why settings cannot be read.
MAX_REASON = 200
DAMAGED = message("the settings in this LoRA are damaged")
SET_UP_AGAIN = message("set up the training again")


def build_again(
    metadata: Mapping[str, str], find_model: Find, find_dataset: Find, find_vae: Find | None = None
) -> TrainConfig:
    """The configuration of the run that made an adapter, with this machine's paths.

    Adapters hold names and no paths. Only names without a folder are
    looked up, so that an adapter from elsewhere cannot point at other files.

    Args:
        metadata: the adapter's.
        find_model: base models with a name.
        find_dataset: cached training sets with a name; their names hold a digest of their content.
        find_vae: VAEs with a name, for runs whose losses are computed on images.

    Returns:
        A configuration to submit; its `output` is a name alone.

    Raises:
        ConfigError: the adapter was not trained by this package, or by a version with other
            settings; or a sentence that names all that is missing here.
    """
    values = read_settings(metadata)
    model, data = values["model"], values["data"]
    wanted = (
        (model, "source", message("the base model"), find_model),
        (data, "folder", message("the training set"), find_dataset),
        (data, "prior", message("the prior's training set"), find_dataset),
        (model, "vae", "the VAE", find_vae or (lambda name: ())),
    )
    missing = []
    for table, key, what, find in wanted:
        name = table.get(key, "")
        if not name:
            continue  # config_from_dict raises where it is required
        found = list(dict.fromkeys(find(name))) if is_plain_name(name) else []
        if len(found) == 1:
            table[key] = str(found[0])
        elif found:
            missing.append(
                message(
                    "{what} {name} was found {num_found} times",
                    what=what,
                    name=shorten(name),
                    num_found=len(found),
                )
            )
        else:
            missing.append(message("{what} {name} is missing", what=what, name=shorten(str(name))))
    if missing:
        raise ConfigError(
            "this LoRA cannot be trained again: {missing}. Put what is missing where it was "
            "under the same name, or set up the training again with Train Qwen Edit LoRA",
            missing=join_messages("; ", missing),
        )
    try:
        return replace(config_from_dict(values), output="again")
    except ConfigError as e:
        raise ConfigError(
            "the settings of the LoRA are of another version: {error}", error=e
        ) from None


def read_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings as a tree of dictionaries with a table for the model and one for the data."""
    text = metadata.get(CONFIG_KEY)
    if text is None:
        raise ConfigError(
            "this LoRA does not say how it was trained; only those that Train Qwen Edit LoRA or "
            "python -m lora_core train made can be trained again"
        )
    try:
        values = parse_object(text, message("the header's {config_key}", config_key=CONFIG_KEY))
    except FileError as e:
        reason = shorten(take_clause(e), MAX_REASON)
        raise ConfigError(
            "{damaged} ({reason}); {set_up_again}",
            damaged=DAMAGED,
            reason=reason,
            set_up_again=SET_UP_AGAIN,
        ) from None
    if not all(isinstance(values.get(table), dict) for table in ("model", "data")):
        raise ConfigError("{damaged}; {set_up_again}", damaged=DAMAGED, set_up_again=SET_UP_AGAIN)
    return values


def is_plain_name(name: object) -> bool:
    """Whether it names a file or folder and no place."""
    return (
        isinstance(name, str)
        and len(name) <= MAX_NAME
        and name not in (".", "..")
        and not any(c in "/\\:\0" for c in name)
    )
