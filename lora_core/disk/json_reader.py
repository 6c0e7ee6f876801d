"""Untrusted JSON: read whole and plain, or refused with a one-sentence error.

The json module alone raises ValueError, RecursionError and MemoryError, takes NaN and Infinity,
which are no JSON, and whole numbers that no float holds, which fail wherever they are used.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .regular_files import MAX_TEXT_BYTES, decode_text, read_bytes

#: Lists and objects inside each other. Python's own limit differs from version to version.
MAX_DEPTH = 64
_MAX_NUMBER = int(sys.float_info.max)


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """The value in a JSON file, read as `parse_json` does.

    Raises:
        MissingFileError: there is no such path.
        FileError: it cannot be opened, is not a regular file, is larger than `max_bytes`, or is not
            what `parse_json` takes.
    """
    return parse_json(read_bytes(path, max_bytes), Path(path).name)


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text; a byte order mark is allowed. Of duplicate keys the last wins.

    Args:
        name: what the message calls the text: a file's name, or "the header's lora_config".

    Raises:
        FileError: no JSON, not UTF-8, deeper than `MAX_DEPTH`, or with a number that is not finite
            as a float.
    """
    if isinstance(text, bytes):
        text = decode_text(text, name)
    try:
        value = json.loads(text.removeprefix("\ufeff"), parse_constant=refuse_constant)
        check_values(value)
    except json.JSONDecodeError as e:
        what = message(
            "{msg}, line {lineno}, column {colno}", msg=e.msg, lineno=e.lineno, colno=e.colno
        )
        raise FileError(
            "{name} cannot be read as JSON: {what}.", name=shorten(name), what=shorten(what)
        ) from None
    except _Refused as e:
        raise FileError(
            "{name} cannot be read as JSON: {error}.", name=shorten(name), error=e
        ) from None
    except RecursionError:
        raise FileError(
            "{name} cannot be read as JSON: {too_deep}.", name=shorten(name), too_deep=_TOO_DEEP
        ) from None
    except ValueError:  # a whole number of more digits than Python converts
        raise FileError(
            "{name} cannot be read as JSON: {too_large}.", name=shorten(name), too_large=_TOO_LARGE
        ) from None
    return value


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """As `parse_json`, where the text must hold an object ({...})."""
    return check_object(parse_json(text, name), name)


def read_object(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """As `read_json`, where the file must hold an object ({...})."""
    return check_object(read_json(path, max_bytes), Path(path).name)


def check_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FileError(
            '{name} holds {value}; expected a JSON object such as {{"name": 1}}.',
            name=shorten(name),
            value=describe_kind(value),
        )
    return value


def describe_kind(value: Any) -> str:
    """What a JSON value is, for a message that expected another kind: "a list", "null", ..."""
    kinds = {
        dict: message("an object"),
        list: message("a list"),
        str: message("text"),
        bool: message("true or false"),
    }
    return "null" if value is None else kinds.get(type(value), message("a number"))


class _Refused(ValueError):
    """Valid for the json module, not for us; the text gives the reason."""


_TOO_DEEP = message("it is nested more than {max_depth} levels deep", max_depth=MAX_DEPTH)
_TOO_LARGE = message("it holds a number that is too large")


def refuse_constant(name: str) -> NoReturn:
    raise _Refused(message("it holds {name}, which is not a JSON number", name=name))


def check_values(value: Any) -> None:
    """Level by level, since recursion would hit the limit that it checks."""
    level: list[Any] = [[value]]
    depth = 0
    while level:
        if depth > MAX_DEPTH:
            raise _Refused(_TOO_DEEP)
        depth += 1
        below = []
        for container in level:
            items = container.values() if type(container) is dict else container
            if are_finite_floats(items):
                continue
            for item in items:
                kind = type(item)
                if kind is float:
                    if item - item:  # NaN, where it was one or an infinity
                        raise _Refused(_TOO_LARGE)
                elif kind is dict or kind is list:
                    below.append(item)
                elif kind is int and not -_MAX_NUMBER <= item <= _MAX_NUMBER:
                    raise _Refused(_TOO_LARGE)
        level = below


def are_finite_floats(items: Collection[Any]) -> bool:
    """Whether all are: a fast path for long lists of numbers; False if in doubt."""
    if type(items) is not list or len(items) < MANY or type(items[0]) is not float:
        return False
    return set(map(type, items)) == {float} and math.isfinite(sum(items))


MANY = 8
