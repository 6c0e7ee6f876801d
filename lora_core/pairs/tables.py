"""Rows of files that may list pairs: .jsonl, .csv, .tsv and .json, of any program."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk.json_reader import describe_kind, parse_json
from ..disk.regular_files import decode_text
from ..errors import FileError
from ..messages import message
from ..text import shorten
from .pair import IsAllowed, read_allowed

MAX_BYTES = 100_000_000
DELIMITERS = ",;\t|"
_SPARE: Any = object()  # key of the cells beyond a CSV's header


@dataclass(frozen=True)
class Row:
    """One line of a list."""

    values: Mapping[str, object]
    """By column: lower case, "_" for blanks and hyphens."""
    fault: str = ""
    """Why it cannot be used, in one sentence."""


@dataclass(frozen=True)
class Table:
    """A file's rows."""

    path: Path
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    """Other lists in the same .json, by their keys."""

    @property
    def name(self) -> str:
        return shorten(self.path.name)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row.values))


def read_table(
    path: Path, known_columns: Collection[str], is_allowed: IsAllowed = lambda path: True
) -> Table:
    """The rows of a file; none where it is JSON without a list of objects.

    Args:
        known_columns: by which a CSV's delimiter is recognised.
        is_allowed: whether the file may be read.

    Raises:
        FileError: no regular file, too long, no UTF-8, damaged, or not one row can be read.
    """
    text = decode_text(read_allowed(path, is_allowed, MAX_BYTES), path.name)
    suffix = path.suffix.lower()
    left_out: tuple[str, ...] = ()
    if suffix == ".jsonl":
        rows = read_lines(text, path.name)
    elif suffix == ".json":
        values, left_out = find_rows(parse_json(text, path.name))
        rows = [build_row(value, path.name, number) for number, value in enumerate(values, 1)]
    else:
        try:
            rows = list(read_cells(text, path.name, known_columns))
        except csv.Error as e:
            raise FileError(
                "{path} is damaged ({error}); correct it or move it elsewhere.",
                path=shorten(path.name),
                error=shorten(str(e)),
            ) from None
    if rows and all(row.fault for row in rows):
        raise FileError(rows[0].fault)
    return Table(path, tuple(rows), left_out)


def read_lines(text: str, name: str) -> list[Row]:
    """One JSON object a line. Only "\\n" ends one: JSON may hold U+2028 and its like."""
    rows = []
    lines = [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(
                line, message("{name}, row {number},", name=shorten(name), number=number)
            )
        except FileError as e:
            rows.append(Row({}, e.message))
        else:
            rows.append(build_row(value, name, number))
    return rows


def find_rows(value: object) -> tuple[list, tuple[str, ...]]:
    """(the rows, keys of further lists): a list, or the first list of objects below a key."""
    if isinstance(value, list):
        return value, ()
    if not isinstance(value, dict):
        return [], ()
    lists = [key for key, inner in value.items() if is_list_of_objects(inner)]
    return (value[lists[0]], tuple(lists[1:])) if lists else ([], ())


def is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def read_cells(text: str, name: str, known_columns: Collection[str]) -> Iterator[Row]:
    """Rows of a CSV with any delimiter."""
    delimiter = choose_delimiter(text.split("\n", 1)[0], known_columns)
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        restkey=_SPARE,
        delimiter=delimiter,
        skipinitialspace=True,
        strict=True,  # a quote that is never closed would swallow the rows after it
    )
    for number, values in enumerate(reader, 1):
        spare = values.pop(_SPARE, [])
        row = build_row({k: v for k, v in values.items() if k or v}, name, number)
        if any(cell.strip() for cell in spare):
            number_cells = len(values) + len(spare)
            fault = message(
                "{name}, row {number}, has {number_cells} cells, but the header has "
                "{num_values}; put texts with {delimiter!r} in quotes.",
                name=shorten(name),
                number=number,
                number_cells=number_cells,
                num_values=len(values),
                delimiter=delimiter,
            )
            row = Row(row.values, fault)
        yield row


def choose_delimiter(header: str, known_columns: Collection[str]) -> str:
    """The one that yields the most known columns; a comma where none does."""

    def count(delimiter: str) -> int:
        names = map(name_column, next(csv.reader([header], delimiter=delimiter), []))
        return sum(name in known_columns for name in names)

    return max(DELIMITERS, key=count)


def build_row(value: object, name: str, number: int) -> Row:
    place = message("{name}, row {number},", name=shorten(name), number=number)
    if not isinstance(value, Mapping):
        return Row(
            {},
            message(
                "{place} is {value}; expected an object with image and edit_image.",
                place=place,
                value=describe_kind(value),
            ),
        )
    values: dict[str, object] = {}
    for column, cell in value.items():
        key = name_column(column)
        if key in values:
            return Row(
                values,
                message(
                    "{place} has two columns named {key}; rename one.",
                    place=place,
                    key=shorten(key),
                ),
            )
        values[key] = cell
    return Row(values)


def name_column(column: object) -> str:
    return str(column).strip().lower().replace(" ", "_").replace("-", "_")
