"""TrainConfig to and from plain dictionaries and TOML or JSON files."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

from ...checks import MAX_WHOLE, show
from ...disk.json_reader import parse_json
from ...disk.regular_files import read_text
from ...errors import ConfigError, FileError
from ...messages import message
from ...text import shorten
from .config import TrainConfig
from .setting_names import suggest

T = TypeVar("T")

#: Lists and tables inside each other, of a setting that takes any.
MAX_DEPTH = 8

#: Paths that a file gives relative to its own folder.
PATHS = (("output",), ("model", "source"), ("model", "vae"), ("data", "folder"), ("data", "prior"))


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a plain tree of dictionaries.

    Raises:
        ConfigError: an unknown key (the text names the nearest known one), a missing one, a value
            of another type or outside its range.
    """
    return build(TrainConfig, values, "")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `config_from_dict`; every value is one that JSON has."""
    return {
        field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def read_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Reads a .toml or .json file; relative paths in it are relative to its folder.

    Raises:
        FileError: the file is missing or no TOML or JSON.
        ConfigError: as `config_from_dict`, with the file's name in front.
    """
    path = Path(path)
    values = parse(read_text(path), path)
    for section, *names in PATHS:
        table = values.get(section) if names else values
        name = names[0] if names else section
        if isinstance(table, dict) and isinstance(table.get(name), str) and table[name]:
            check_path(table[name], f"{shorten(path.name)}: {'.'.join((section, *names))}")
            table[name] = os.path.normpath(path.parent.absolute() / table[name])
    try:
        return config_from_dict(values)
    except ConfigError as e:
        raise ConfigError("{path}: {error}", path=shorten(path.name), error=e) from None


def parse(text: str, path: Path) -> dict[str, Any]:
    name = shorten(path.name)
    values = parse_json(text, path.name) if path.suffix == ".json" else parse_toml(text, name)
    if not isinstance(values, dict):
        raise FileError("{name} holds no table of settings.", name=name)
    return values


def parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        reader: Any = import_module("tomllib")
    except ImportError:  # Python 3.10
        reader = import_module("tomli")
    try:
        return reader.loads(text)
    except RecursionError:
        raise FileError(
            "{name} cannot be read as TOML: it is nested too deep.", name=name
        ) from None
    except ValueError as e:
        hint = " " + BACKSLASHES if QUOTED_BACKSLASH.search(text) else ""
        raise FileError(
            "{name} cannot be read as TOML: {error}.{hint}",
            name=name,
            error=shorten(str(e), 200),
            hint=hint,
        ) from None


#: As in "C:\models"; the first backslash between double quotes on one line.
QUOTED_BACKSLASH = re.compile(r'"[^"\\\n]{0,1000}\\')
BACKSLASHES = message(
    "In double quotes a backslash begins a special character: write paths with / or in "
    "single quotes."
)


def check_path(text: str, where: str) -> None:
    """ConfigError for characters that no path has: "C:\new" in double quotes holds a line break."""
    if any(ord(character) < ord(" ") for character in text):
        raise ConfigError(
            "{where} is {text}, with a line break, a tab or another control character. "
            "{backslashes}",
            where=where,
            text=shorten(repr(text)),
            backslashes=BACKSLASHES,
        )


def build(section: Callable[..., T], values: Mapping[str, Any], where: str) -> T:
    """One dataclass of the tree from a dictionary of its fields."""
    place = f"[{where}]" if where else message("the configuration")
    if not isinstance(values, Mapping):
        raise ConfigError(
            "{place} is {values}; expected a table of settings", place=place, values=show(values)
        )
    fields = {field.name: field for field in dataclasses.fields(cast(Any, section))}
    for key in values:
        if key not in fields:
            hint = suggest(shorten(str(key)), fields, where, list_places())
            raise ConfigError(
                "{place} has no setting {key}{hint}", place=place, key=show(key), hint=hint
            )
    types_of = get_hints(section)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = convert(values[name], types_of[name], f"{where}.{name}".strip("."))
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError("{place} lacks {name}; add it", place=place, name=name)
    try:
        return section(**arguments)
    except ConfigError as e:
        if where:
            raise ConfigError("[{where}] {error}", where=where, error=e) from None
        raise ConfigError(e) from None


@cache
def get_hints(section: Any) -> dict[str, Any]:
    """Field -> its type; a list of many jobs asks for the same few classes each time."""
    return typing.get_type_hints(section)


def list_places() -> list[str]:
    """Every setting by its dotted place; those above all tables by their names."""
    places = []
    for name, hint in get_hints(TrainConfig).items():
        is_table = dataclasses.is_dataclass(hint)
        inside = [f"{name}.{field.name}" for field in dataclasses.fields(hint)] if is_table else []
        places += [name, *inside]
    return places


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value as its field's type; integers are accepted as floats, lists as tuples."""
    if hint is typing.Any:
        return check_plain(value, where)
    if dataclasses.is_dataclass(hint):
        return build(cast(Any, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        for kind in kinds[:-1]:
            if isinstance(kind, type) and isinstance(value, kind):
                return convert(value, kind, where)
        return convert(value, kinds[-1], where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(item, arguments[0], where) for item in value)
        if isinstance(value, arguments[0]):
            return (value,)
    elif origin is not None and isinstance(value, Mapping):
        return {
            str(k): convert(v, arguments[1], f"{where}.{shorten(str(k))}") for k, v in value.items()
        }
    is_flag = isinstance(value, bool)  # an int to Python
    if isinstance(value, int) and not is_flag and hint in (int, float):
        if abs(value) <= MAX_WHOLE:
            return hint(value)
    elif origin is None and isinstance(value, hint) and (hint is bool or not is_flag):
        return value
    raise ConfigError(
        "{where} is {value}; expected {hint}",
        where=where,
        value=show(value),
        hint=describe_type(hint),
    )


def check_plain(value: Any, where: str, depth: int = 0) -> Any:
    """The value itself, of a setting that takes any: what JSON can hold, and not too much of it."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and abs(value) <= MAX_WHOLE:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple | Mapping) and depth < MAX_DEPTH:
        for item in value.values() if isinstance(value, Mapping) else value:
            check_plain(item, where, depth + 1)
        if not isinstance(value, Mapping) or all(isinstance(key, str) for key in value):
            return value
    raise ConfigError(
        "{where} is or holds {value}; expected true, false, text, a finite number, or up to "
        "{max_depth} lists and tables of them inside each other",
        where=where,
        value=show(value),
        max_depth=MAX_DEPTH,
    )


def describe_type(hint: Any) -> str:
    names = {
        int: message("a whole number"),
        float: message("a number"),
        bool: message("true or false"),
        str: message("text"),
    }
    origin = typing.get_origin(hint)
    if origin is tuple:
        return message("a list of strings")
    return message("a table") if origin is not None else names.get(hint, str(hint))


def to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"rank": 8}} -> {"lora.rank": 8}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
