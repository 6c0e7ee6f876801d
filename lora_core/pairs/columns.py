"""What the columns of a list mean: targets, references in their order, masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ..disk.json_reader import describe_kind, parse_json
from ..errors import FileError
from ..text import shorten
from .images import SUFFIXES
from .listing import UNREAD_SUFFIXES
from .pair import CAPTION_COLUMNS
from .roles import MASK, REFERENCE, TARGET, parse_name

#: Columns by meaning, the surest first.
TARGET_COLUMNS = (
    *("target", "target_image", "target_path", "edited_image", "output_image", "output", "after"),
    *("image", "image_path", "file_name", "file"),
)
REFERENCE_COLUMNS = (
    *("edit_image", "edit_images", "control", "control_path", "control_image", "control_images"),
    *("conditioning_image", "conditioning_images", "source", "source_image", "original_image"),
    *("input_image", "input", "before", "reference", "references", "reference_image", "ref_image"),
    *("reference_images", "condition_image"),
)
MASK_COLUMNS = ("mask", "mask_path", "mask_image", "mask_file")
KNOWN_COLUMNS = frozenset({*TARGET_COLUMNS, *REFERENCE_COLUMNS, *MASK_COLUMNS, *CAPTION_COLUMNS})
ENDINGS = ("_path", "_file_name", "_filename", "_file")
MAX_COLUMN = 80  # letters; no meaningful name is longer
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")


@dataclass
class RowFiles:
    """The files that a row names."""

    target: object = None
    references: list[object] = field(default_factory=list)
    """Cells, in the order of their columns' numbers."""
    mask: object = None
    unused: list[str] = field(default_factory=list)
    """Columns that name images and are not read."""

    @property
    def is_pair(self) -> bool:
        return bool(self.target) and bool(self.references)


def read_columns(row: Mapping[str, object]) -> RowFiles:
    """Which cell is what; an unknown column is classified by its words, such as `before_image`, if
    it names an image."""
    targets = {name: row[name] for name in TARGET_COLUMNS if row.get(name)}
    references: list[tuple[int, str, object]] = []
    masks: dict[str, object] = {}
    for column, value in row.items():
        if not value or column in targets or column in CAPTION_COLUMNS:
            continue
        plain, number = split_number(column)
        kind = find_kind(plain, value)
        if kind == REFERENCE:
            references.append((number, column, value))
        elif kind == MASK:
            masks[column] = value
        elif kind == TARGET:
            targets[column] = value
    target = next(iter(targets), None)
    # `image` is the source where another column is the target.
    if not references and "image" in targets and target != "image":
        references.append((0, "image", targets["image"]))
    references.sort(key=lambda found: found[0])
    mask = next(iter(masks), None)
    used = {target, mask, *(column for _, column, _ in references)}
    if target is not None:
        used |= {column for column, value in targets.items() if value == targets[target]}
    return RowFiles(
        None if target is None else targets[target],
        [value for _, _, value in references],
        None if mask is None else masks[mask],
        [column for column, value in row.items() if column not in used and names_image(value)],
    )


def split_number(column: str) -> tuple[str, int]:
    """`edit_image_2` -> ("edit_image", 2); -1 where there is no number."""
    plain = column.rstrip("0123456789")
    digits = column[len(plain) :]
    if not digits or len(digits) > 6:
        return column, -1
    return plain.rstrip("_"), int(digits)


def find_kind(plain: str, value: object) -> str | None:
    if plain in REFERENCE_COLUMNS:
        return REFERENCE
    if plain in MASK_COLUMNS:
        return MASK
    if len(plain) > MAX_COLUMN or not names_image(value):
        return None
    ending = next((ending for ending in ENDINGS if plain.endswith(ending)), "")
    role = parse_name(plain.removesuffix(ending))
    return None if role is None else role.kind


def names_image(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 4096:
        return False
    return PurePosixPath(value.strip()).suffix.lower() in SUFFIXES | UNREAD_SUFFIXES


def read_paths(value: object, place: str) -> list[str]:
    """The paths in a cell; a CSV holds lists as JSON, or as Python prints them.

    Raises:
        FileError: something else; the message calls the cell `place`.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_list(value.strip())
    values = value if isinstance(value, list) else [value]
    paths = []
    for path in values:
        if not isinstance(path, str):
            raise FileError(
                "{place} is {path}; expected the path of an image.",
                place=shorten(place),
                path=describe_kind(path),
            )
        if path.strip():
            paths.append(path)
    return paths


def parse_list(text: str) -> object:
    """The list that a text spells; the text itself where it spells none."""
    try:
        return parse_json(text, "a cell")
    except FileError:
        pass
    if set(_QUOTED.sub("", text)) <= set("[], "):
        return ["".join(found) for found in _QUOTED.findall(text)]
    return text
