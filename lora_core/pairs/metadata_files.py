"""Files that list pairs: `metadata.jsonl`, `.csv` and `.json` of DiffSynth, musubi-tuner, HF."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .columns import KNOWN_COLUMNS, RowFiles, read_columns, read_paths
from .images import FileImage
from .listing import Listing, is_json, make_key
from .pair import (
    UNUSABLE,
    FoundPairs,
    IsAllowed,
    Level,
    Pair,
    Problem,
    check_allowed,
    check_references,
    choose_caption,
    list_some,
    open_file,
)
from .tables import Row, Table, read_table

#: What these trainers call them; any other name is read too where its rows name pairs.
NAMES = re.compile(r"(metadata|dataset|data|train)\.(jsonl|csv|tsv|json)", re.IGNORECASE)
MAX_TRIED = 20  # rows checked in a list of another name


def find_list(listing: Listing, is_allowed: IsAllowed) -> tuple[Table | None, list[Problem]]:
    """The file that lists the pairs, and problems with the others.

    Raises:
        FileError: one of the usual names cannot be read.
    """
    chosen: Table | None = None
    problems: list[Problem] = []
    others: list[Path] = []
    paths = [p for p in listing.lists if not is_json(p) or not is_beside_image(p, listing)]
    for path in sorted(paths, key=lambda path: not NAMES.fullmatch(path.name)):
        try:
            table = read_table(path, KNOWN_COLUMNS, is_allowed)
        except FileError as e:
            if NAMES.fullmatch(path.name):
                raise
            problems.append(
                Problem(Level.WARNING, "list_unreadable", message("not read: {error}", error=e))
            )
            continue
        pairs = [row for row in table.rows if read_columns(row.values).is_pair]
        if not pairs:
            if KNOWN_COLUMNS.intersection(table.columns):
                problems.append(Problem(Level.WARNING, "list_unused", describe_unused(table)))
            else:
                others.append(path)
        elif not NAMES.fullmatch(path.name) and not any(
            map(ListReader(table, listing.root, is_allowed).has_files, pairs[:MAX_TRIED])
        ):
            text = message(
                "{table} is not used, since it names no images that are there", table=table.name
            )
            problems.append(Problem(Level.WARNING, "list_unused", text))
        elif chosen is None:
            chosen = table
        else:
            text = message(
                "{table} lists pairs too and is not used; {chosen} is",
                table=table.name,
                chosen=chosen.name,
            )
            problems.append(Problem(Level.WARNING, "list_unused", text))
    if others:
        text = message(
            "files without a list of pairs, not read: {num_others}, such as {others}",
            num_others=len(others),
            others=list_some(others, listing.root, 1),
        )
        problems.append(Problem(Level.NOTE, "list_other", text, count=len(others)))
    return chosen, problems


def is_beside_image(path: Path, listing: Listing) -> bool:
    return make_key(listing.root, path) in listing.images


def describe_unused(table: Table) -> str:
    columns = ", ".join(shorten(column, 30) for column in table.columns[:6])
    return message(
        "{table} is not used, since no row has both a target and a reference (columns: "
        "{columns}); expected columns such as image, edit_image and prompt",
        table=table.name,
        columns=columns,
    )


def read_list(table: Table, listing: Listing, is_allowed: IsAllowed) -> FoundPairs:
    """Pairs as listed, in the file's order."""
    reader = ListReader(table, listing.root, is_allowed)
    pairs, problems = [], []
    for number, row in enumerate(table.rows, 1):
        try:
            pairs.append(reader.build_pair(row, number))
        except FileError as e:
            problems.append(Problem(Level.STOP, UNUSABLE, e.message, reader.name))
    problems += reader.report_unused_columns()
    if table.left_out:
        keys = ", ".join(shorten(key, 30) for key in table.left_out[:3])
        text = message(
            "{table} holds further lists that are not used: {keys}", table=table.name, keys=keys
        )
        problems.append(Problem(Level.WARNING, "list_unused", text, count=len(table.left_out)))
    problems += report_unlisted(table, listing, pairs)
    return FoundPairs(message("listed in {table}", table=table.name), tuple(pairs), tuple(problems))


def report_unlisted(table: Table, listing: Listing, pairs: Sequence[Pair]) -> list[Problem]:
    images = [image for pair in pairs for image in pair.images if isinstance(image, FileImage)]
    listed = {os.path.normpath(image.path) for image in images}
    unlisted = [
        path
        for paths in listing.images.values()
        for path in paths
        if os.path.normpath(path) not in listed
    ]
    if not unlisted:
        return []
    text = message(
        "images that {table} does not list: {num_unlisted}, such as {unlisted}",
        table=table.name,
        num_unlisted=len(unlisted),
        unlisted=list_some(unlisted, listing.root, 1),
    )
    return [Problem(Level.NOTE, "pictures_unlisted", text, count=len(unlisted))]


class ListReader:
    """Turns rows into pairs, one at a time."""

    def __init__(self, table: Table, folder: Path, is_allowed: IsAllowed):
        self.table = table
        self.folder = folder
        self.is_allowed = is_allowed
        self.name = ""
        """Of the current pair."""
        self._names: set[str] = set()
        self._unused: Counter[str] = Counter()
        self._composed: dict[Path, dict[str, str]] = {}

    def build_pair(self, row: Row, number: int) -> Pair:
        """FileError for a row that is no pair."""
        self.name = message("line {number}", number=number)
        if row.fault:
            raise FileError(row.fault)
        place = message("{table}, row {number},", table=self.table.name, number=number)
        files = read_columns(row.values)
        if not files.is_pair:
            raise FileError(
                "{place} lacks a target or a reference; expected columns such as image, "
                "edit_image and prompt.",
                place=place,
            )
        self._unused.update(files.unused)
        target = self._open_one(files.target, message("the target in {place}", place=place[:-1]))
        stem = target.path.stem
        self.name = stem if stem not in self._names else f"line {number} {stem}"
        self._names.add(self.name)
        references = self._open_references(files, place)
        check_references(shorten(target.name), len(references))
        mask = None
        if files.mask:
            mask = self._open_one(files.mask, message("the mask in {place}", place=place[:-1]))
        caption = choose_caption(row.values, place[:-1])
        return Pair(self.name, target, references, caption, mask)

    def has_files(self, row: Row) -> bool:
        """Whether the images of a row exist."""
        files = read_columns(row.values)
        try:
            self._open_one(files.target, "the target")
            self._open_references(files, "the row,")
        except FileError:
            return False
        return True

    def report_unused_columns(self) -> list[Problem]:
        """Columns that name images and are not read."""
        if not self._unused:
            return []
        columns = ", ".join(shorten(column, 30) for column in list(self._unused)[:4])
        count = max(self._unused.values())
        text = message(
            "columns of {table} that name images and are not used: {columns}, in {count} "
            "rows; references are read from control or edit_image, masks from mask",
            table=self.table.name,
            columns=columns,
            count=count,
        )
        return [Problem(Level.WARNING, "columns_unused", text, count=count)]

    def _open_references(self, files: RowFiles, place: str) -> tuple[FileImage, ...]:
        return tuple(
            self._open(path)
            for value in files.references
            for path in read_paths(value, message("a reference in {place}", place=place[:-1]))
        )

    def _open_one(self, value: object, place: str) -> FileImage:
        paths = read_paths(value, place)
        if len(paths) != 1:
            raise FileError(
                "{place} is a list of {num_paths}; expected the path of one image.",
                place=place,
                num_paths=len(paths),
            )
        return self._open(paths[0])

    def _open(self, named: str) -> FileImage:
        """A file that a row names, relative to the folder."""
        if "\0" in named:
            raise FileError(
                "{table} names a file that cannot exist ({named!r}).",
                table=self.table.name,
                named=shorten(named),
            )
        path = self.folder / named.replace("\\", "/")
        if not is_file(path):
            path = self._find_composed(self.folder / named.strip().replace("\\", "/"))
        check_allowed(path, self.is_allowed)
        if not is_file(path):
            raise FileError(
                "{table} names {named}, which does not exist; expected a path relative to the "
                "folder.",
                table=self.table.name,
                named=shorten(named),
            )
        return open_file(path, self.folder, self.is_allowed)

    def _find_composed(self, path: Path) -> Path:
        """The file whose name differs only in how accents are encoded, or `path` itself."""
        if is_file(path) or path.as_posix().isascii() or not path.is_relative_to(self.folder):
            return path
        found = self.folder
        for part in path.relative_to(self.folder).parts:
            if found not in self._composed:
                self._composed[found] = list_composed(found)
            found /= self._composed[found].get(unicodedata.normalize("NFC", part), part)
        return found


def list_composed(folder: Path) -> dict[str, str]:
    """Names in a folder by their composed form; none where it cannot be read."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (OSError, ValueError):
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}


def is_file(path: Path) -> bool:
    """Also for names that no disk takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
