"""JSON that this package wrote, read back as dataclasses: parsed and checked in one pass."""

from __future__ import annotations

import codecs
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from annotated_types import Interval  # a part of pydantic, which itself takes longer to import

from ..checks import MAX_WHOLE, show
from ..errors import FileError
from ..messages import message
from ..text import shorten
from .regular_files import MAX_TEXT_BYTES, read_bytes

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

#: An integer that a float can hold: calculations with it do not overflow.
Whole = Annotated[int, Interval(ge=-MAX_WHOLE, le=MAX_WHOLE)]


def read_typed(path: str | os.PathLike[str], kind: type[T], max_bytes: int = MAX_TEXT_BYTES) -> T:
    """The dataclass that a JSON file holds; lists become tuples where its fields are some.

    Raises:
        MissingFileError: there is no such path.
        FileError: it cannot be opened, is no regular file, is larger than `max_bytes`, or holds no
            JSON of exactly these fields: a text is no number, and a float is finite.
    """
    data = read_bytes(path, max_bytes)
    try:
        return parse_typed(data, kind)
    except ValueError as e:
        raise FileError(
            "{path} is damaged ({error}).", path=shorten(Path(path).name), error=e
        ) from None


def parse_typed(data: bytes, kind: type[T], allows_more: bool = False) -> T:
    """The same of a JSON text.

    Args:
        allows_more: skip names that are no fields.

    Raises:
        ValueError: with the first fault, such as "step is 'x': Input should be a valid integer".
    """
    from pydantic import ValidationError

    try:
        return get_reader(cast(Any, kind), allows_more).validate_json(
            data.removeprefix(codecs.BOM_UTF8)
        )
    except ValidationError as e:
        fault = e.errors(include_url=False, include_context=False)[0]
        place, value = ".".join(map(str, fault["loc"])), fault["input"]
        found = (
            message(" is {value}", value=show(value))
            if isinstance(value, str | int | float | None)
            else ""
        )
        raise ValueError(
            message(
                "{place}{found}: {fault}",
                place=shorten(place or "it"),
                found=found,
                fault=shorten(fault["msg"]),
            )
        ) from None


@cache
def get_reader(kind: type, allows_more: bool) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(
        strict=True, extra="ignore" if allows_more else "forbid", allow_inf_nan=False
    )
    return TypeAdapter(with_config(config)(kind))
