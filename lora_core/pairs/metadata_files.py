"""Files that list pairs: `metadata.jsonl`, `.csv` and `.json` of DiffSynth, musubi-tuner, HF."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import FileError
from ..stored import shorten
from .pair import (
    FoundPairs,
    IsAllowed,
    Level,
    Pair,
    Problem,
    check_allowed,
    check_references,
    open_file,
)
from .pictures import FilePicture

MAX_BYTES = 100_000_000
NAMES = re.compile(r"(metadata|dataset|data|train)\.(jsonl|csv|json)", re.IGNORECASE)

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
CAPTION_COLUMNS = (
    *("edit_prompt", "instruction", "edit_instruction", "prompt", "caption", "text"),
)


def find_metadata(folder: Path, is_allowed: IsAllowed) -> Path | None:
    """The file that lists the pairs, where there is one with columns for both pictures."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and NAMES.fullmatch(path.name):
            check_allowed(path, is_allowed)
            rows = read_rows(path)
            if rows and isinstance(rows[0], Mapping) and has_pair(rows[0]):
                return path
    return None


def has_pair(row: Mapping[str, object]) -> bool:
    return bool(find_target(row)) and bool(find_references(row))


def find_target(row: Mapping[str, object]) -> object:
    return next((row[name] for name in TARGET_COLUMNS if row.get(name)), None)


def find_references(row: Mapping[str, object]) -> list[str]:
    """Every reference a row names; a column may hold a list, or a number at its end."""
    found: list[str] = []
    for column, value in row.items():
        plain = re.sub(r"_?\d+$", "", str(column))
        if plain in REFERENCE_COLUMNS and value:
            found += read_list(value)
    # `image` is the source where another column says target.
    if not found and row.get("image") and find_target(row) != row["image"]:
        found += read_list(row["image"])
    return found


def read_list(value: object) -> list[str]:
    """CSV holds lists as JSON."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [str(value)]
    return [str(v) for v in value if v] if isinstance(value, list) else [str(value)]


def read_rows(path: Path) -> list:
    """The rows of a file.

    Raises:
        FileError: too long, damaged or no UTF-8.
    """
    name = shorten(path.name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{name} is larger than {MAX_BYTES // 10**6} MB; split the set.")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
        return rows if isinstance(rows, list) else []
    except UnicodeDecodeError:
        raise FileError(f"{name} is no UTF-8 text; save it again as UTF-8.") from None
    except (ValueError, csv.Error) as e:
        raise FileError(f"{name} is damaged ({e}); correct it or move it elsewhere.") from None
    except OSError as e:
        raise FileError(f"{name} cannot be opened: {e.strerror}.") from None


def read_metadata(path: Path, folder: Path, is_allowed: IsAllowed) -> FoundPairs:
    """Pairs as listed, in the file's order."""
    pairs, problems, names = [], [], set()
    for number, row in enumerate(read_rows(path), 1):
        name = f"line {number}"
        try:
            if not isinstance(row, Mapping) or not has_pair(row):
                raise FileError(
                    f"{path.name}, row {number}, lacks a target or a reference; expected columns "
                    "such as image, edit_image and prompt."
                )
            target = find_file(str(find_target(row)), path, folder, is_allowed)
            name = (
                target.path.stem if target.path.stem not in names else f"{name} {target.path.stem}"
            )
            names.add(name)
            references = [
                find_file(file, path, folder, is_allowed) for file in find_references(row)
            ]
            check_references(target.name, len(references))
            caption = next((row[c] for c in CAPTION_COLUMNS if row.get(c) is not None), None)
            pairs.append(
                Pair(
                    name=name,
                    target=target,
                    references=tuple(references),
                    caption=None if caption is None else str(caption).strip(),
                )
            )
        except FileError as e:
            problems.append(Problem(Level.STOP, str(e), name))
    return FoundPairs(f"listed in {path.name}", tuple(pairs), tuple(problems))


def find_file(named: str, path: Path, folder: Path, is_allowed: IsAllowed) -> FilePicture:
    """A file that a row names, relative to the folder."""
    if "\0" in named:
        raise FileError(f"{path.name} names a file that cannot exist ({shorten(named)!r}).")
    file = folder / named.replace("\\", "/")
    check_allowed(file, is_allowed)
    if not file.is_file():
        raise FileError(
            f"{path.name} names {shorten(named)}, which does not exist; expected a path relative "
            "to the folder."
        )
    return open_file(file, folder, is_allowed)
