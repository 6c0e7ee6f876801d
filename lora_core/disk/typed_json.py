"""JSON that this package wrote, read back as dataclasses: parsed and checked in one pass."""

from __future__ import annotations

import codecs
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Interval  # a part of pydantic, which itself takes longer to import

from ..checks import MAX_WHOLE
from ..errors import FileError
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
        FileError: it cannot be opened, is no regular file, is larger than `max_bytes`, or is no
            JSON of exactly these fields: a text is no number, and a float is finite.
    """
    from pydantic import ValidationError

    data = read_bytes(path, max_bytes).removeprefix(codecs.BOM_UTF8)
    try:
        return get_reader(kind).validate_json(data)
    except ValidationError as e:
        fault = e.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"])) or "it"
        name, text = shorten(Path(path).name), f"{shorten(place)}: {shorten(fault['msg'])}"
        raise FileError(f"{name} is damaged ({text}).") from None


@cache
def get_reader(kind: type) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(with_config(config)(kind))
