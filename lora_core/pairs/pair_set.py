"""A set of pairs while it is put together: folders of targets and references, complete or not."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..disk.writing import explain
from ..errors import FileError, LoraError
from ..text import shorten
from .folder_layouts import SideFolders, find_sides, list_targets, pair_files
from .listing import Listing, fold, list_files, make_key, sort_naturally
from .metadata_files import find_list
from .pair import IsAllowed, Pair, check_allowed, read_caption
from .parts import Builder, Parts, restore_case
from .roles import REFERENCE, TARGET, parse_folder

TARGET_FOLDER, REFERENCE_FOLDER = "target", "control"


class UnknownPairError(LoraError, LookupError):
    """There is no such set, pair or image (any more)."""


class PairConflictError(LoraError):
    """What is there now forbids the change."""


@dataclass(frozen=True)
class SetPair:
    """The files of one pair; any of them may be missing."""

    parts: Parts
    name: str
    """The names' common part, as the user wrote it."""
    caption_path: Path | None

    @property
    def id(self) -> str:
        return compute_id(self.parts.name)

    @property
    def target(self) -> Path | None:
        return self.parts.targets[0] if self.parts.targets else None

    @property
    def references(self) -> list[Path]:
        return self.parts.reference_paths

    @property
    def files(self) -> list[Path]:
        captions = [] if self.caption_path is None else [self.caption_path]
        return [*self.parts.paths, *captions]


@dataclass(frozen=True)
class PairSet:
    """A set as its folders were a moment ago."""

    listing: Listing
    sides: SideFolders
    """`target` is always given; folders may be empty or not exist yet."""
    pairs: tuple[SetPair, ...]
    is_allowed: IsAllowed

    @property
    def folder(self) -> Path:
        return self.listing.root

    @property
    def target_folder(self) -> Path:
        return self.sides.target or self.folder

    def find(self, pair_id: str) -> SetPair:
        """Raises UnknownPairError."""
        for pair in self.pairs:
            if pair.id == pair_id:
                return pair
        raise UnknownPairError(
            "this pair is not there any more; its files were moved or deleted. Refresh the list."
        )

    def read_caption(self, pair: SetPair) -> str:
        """Empty if there is none.

        Raises:
            FileError: as `pair.read_caption`.
        """
        if pair.caption_path is None:
            return ""
        return read_caption(pair.caption_path, self.is_allowed) or ""

    def with_caption(self, pair_id: str, path: Path | None) -> PairSet:
        """The same set after a pair's caption was written to a file of its own."""
        pairs = tuple(
            replace(pair, caption_path=path) if pair.id == pair_id else pair for pair in self.pairs
        )
        if path is not None:
            files = self.listing.captions.setdefault(make_key(self.folder, path), [])
            files[:] = [path, *(one for one in files if one != path)]
        return replace(self, pairs=pairs)

    def build_pair(self, pair: SetPair) -> Pair:
        """As the training will read it; FileError if files are missing or too many."""
        return Builder(self.listing, self.is_allowed).build_pair(pair.parts)


def compute_id(name: str) -> str:
    """16 hexadecimal digits that stand for a name in URLs."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def open_set(folder: Path, is_allowed: IsAllowed) -> PairSet:
    """
    Raises:
        FileError: the folder cannot be read, or is of a layout that is not edited here.
    """
    check_allowed(folder, is_allowed)
    listing = list_files(folder, is_allowed)
    if listing.lists:
        table, _ = find_list(listing, is_allowed)
        if table is not None:
            raise FileError(
                "{folder} is read by {table}, which lists its pairs; edit that file, or move it "
                "elsewhere to edit the pairs here.",
                folder=shorten(folder.name),
                table=table.name,
            )
    sides = complete_sides(listing, find_sides(listing), is_allowed)
    images = list_targets(listing, sides, sides.references)
    parts = pair_files(listing, sides, images)
    parts.sort(key=lambda part: sort_naturally(part.name))
    pairs = tuple(
        SetPair(part, restore_name(listing, part), listing.find_caption(part.caption_keys))
        for part in parts
    )
    return PairSet(listing, sides, pairs, is_allowed)


def complete_sides(listing: Listing, sides: SideFolders, is_allowed: IsAllowed) -> SideFolders:
    """With the folders that hold nothing yet."""
    empty: dict[str, list[tuple[int, Path]]] = {TARGET: [], REFERENCE: []}
    for path in list_folders(sides.base):
        role = parse_folder(path.name)
        if role is None or role.kind not in empty or path in sides.taken or role.number < 0:
            continue
        if not path.is_symlink() or is_inside(path, is_allowed):
            empty[role.kind].append((role.number, path))
    known = [(get_number(path), path) for path in sides.references]
    references = [path for _, path in sorted(known + empty[REFERENCE], key=lambda one: one[0])]
    target = sides.target
    if target is None and empty[TARGET]:
        target = empty[TARGET][0][1]
    elif target is None and not has_targets_on_top(listing, sides):
        target = sides.base / TARGET_FOLDER
    return replace(sides, target=target, references=tuple(references))


def has_targets_on_top(listing: Listing, sides: SideFolders) -> bool:
    """Whether the targets are in the set's own folder, next to those of the references."""
    return bool(sides.references and listing.list_folder(listing.root, is_deep=False))


def get_number(path: Path) -> int:
    role = parse_folder(path.name)
    return 0 if role is None else role.number


def list_folders(folder: Path) -> list[Path]:
    """Folders right below, hidden ones left out, in natural order.

    Raises:
        FileError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as e:
        raise FileError(
            "{folder} cannot be opened: {reason}.", folder=shorten(folder.name), reason=explain(e)
        ) from None
    return [folder / name for name in sorted(names, key=sort_naturally) if name[0] != "."]


def is_inside(path: Path, is_allowed: IsAllowed) -> bool:
    try:
        check_allowed(path, is_allowed)
    except FileError:
        return False
    return True


def check_inside(path: Path, is_allowed: IsAllowed) -> None:
    """As `check_allowed`, as a conflict: the request itself is not at fault, nor is the disk."""
    try:
        check_allowed(path, is_allowed)
    except FileError as e:
        raise PairConflictError(e) from None


def looks_like_set(folder: Path) -> bool:
    """Whether the names of its folders are those of a set: both sides, or targets in itself.

    Raises:
        FileError: the folder cannot be read.
    """
    roles = {parse_folder(path.name) for path in list_folders(folder)}
    kinds = {role.kind for role in roles if role is not None}
    if TARGET in kinds and REFERENCE in kinds:
        return True
    is_named = any(role is not None and role.kind == TARGET and role.number >= 0 for role in roles)
    return is_named or REFERENCE in kinds


def restore_name(listing: Listing, part: Parts) -> str:
    path = part.paths[0]
    return restore_case(part.name, path.relative_to(listing.root).as_posix())


def is_taken(opened: PairSet, folder: Path, name: str) -> bool:
    """Whether a folder of a set has an image of this name, with whatever ending."""
    if not folder.is_relative_to(opened.folder):
        return False
    return fold(name) in opened.listing.list_folder(folder)


def prepare_folder(opened: PairSet, folder: Path) -> None:
    """Makes a folder of the set unless it exists.

    Raises:
        PairConflictError: it leads outside the allowed folders.
        FileError: it cannot be made.
    """
    check_inside(folder, opened.is_allowed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(
            "{folder} cannot be made: {reason}.", folder=shorten(folder.name), reason=explain(e)
        ) from None
