"""Targets in one folder, references in others, paired by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .listing import Listing, fold_key, sort_naturally
from .pair import list_some
from .parts import Collected, Parts, join_key
from .roles import CAPTION, MASK, REFERENCE, TARGET, Role, parse_ending, parse_folder

_NUMBER = re.compile(r"(.+)[ _-](\d+)")


@dataclass(frozen=True)
class SideFolders:
    """Where targets, references, masks and captions are."""

    base: Path
    """The folder that holds them: the set's own, or one in it such as train/."""
    target: Path | None
    """None if the targets are in the set's own folder."""
    references: tuple[Path, ...]
    masks: tuple[Path, ...]
    captions: tuple[Path, ...]
    taken: frozenset[Path]
    """All that have a role, unused ones included."""


def find_sides(listing: Listing) -> SideFolders:
    """The folders that have a role by their names.

    Raises:
        FileError: several folders of targets, or several sets.
    """
    root = listing.root
    base, by_role = find_role_folders(listing)
    targets = by_role[TARGET]
    if len(targets) > 1:  # `images` only where no folder is named target
        targets = [found for found in targets if found[0].number >= 0] or targets
    if len(targets) > 1:
        names = list_some([path for _, path in targets], root).replace(", ", " and ", 1)
        raise FileError(
            "{root} holds several folders of targets ({names}); expected one. Rename or remove "
            "the others.",
            root=shorten(root.name),
            names=names,
        )
    references = sorted(by_role[REFERENCE], key=lambda found: found[0].number)
    return SideFolders(
        base=base,
        target=targets[0][1] if targets else None,
        references=tuple(path for _, path in references),
        masks=tuple(path for _, path in by_role[MASK]),
        captions=tuple(path for _, path in by_role[CAPTION]),
        taken=frozenset(path for found in by_role.values() for _, path in found),
    )


def collect_folders(listing: Listing, others: Sequence[Listing]) -> Collected | None:
    """Targets in one folder, references in others, paired by name."""
    root = listing.root
    sides = find_sides(listing)
    folders = [other.root for other in others] or list(sides.references)
    if not folders:
        return None
    images = list_targets(listing, sides, folders)
    if not images:
        return None
    parts = pair_files(listing, sides, images, others)
    base, target_folder = sides.base, sides.target or root
    where = message("the folder itself") if target_folder == root else show_folder(target_folder)
    names = ", ".join(show_folder(path) for path in folders[:4])
    within = "" if base == root else message(" in {base}", base=show_folder(base))
    return message(
        "targets in {where}, references in {names}{within}", where=where, names=names, within=within
    ), parts


def list_targets(
    listing: Listing, sides: SideFolders, folders: Sequence[Path]
) -> dict[str, list[Path]]:
    """Images of the targets' folder, by key.

    Args:
        folders: those of the references.
    """
    if sides.target is not None:
        return listing.list_folder(sides.target)
    taken = sides.taken | set(folders)
    return {
        key: paths
        for key, paths in listing.list_folder(listing.root).items()
        if not any(paths[0].is_relative_to(path) for path in taken)
    }


def pair_files(
    listing: Listing,
    sides: SideFolders,
    images: Mapping[str, list[Path]],
    others: Sequence[Listing] = (),
) -> list[Parts]:
    """The files of each pair, and where its caption may be.

    Args:
        images: those of `list_targets`.
        others: listings of the references' folders, if they are not inside the set's.
    """
    root = listing.root
    folders = [other.root for other in others] or list(sides.references)
    references = [other.images for other in others] or map(listing.list_folder, sides.references)
    files = [(REFERENCE, number, found) for number, found in enumerate(references)]
    files += [(MASK, 0, listing.list_folder(path)) for path in sides.masks]
    places = [sides.target or root, *sides.captions, sides.base, root, *folders]
    inside = [
        "" if place == root else f"{place.relative_to(root).as_posix()}/"
        for place in dict.fromkeys(places)
        if place.is_relative_to(root)
    ]
    parts = pair_by_name(images, files)
    for part in parts:
        keys = name_captions(part)
        part.caption_keys = [fold_key(f"{place}{key}") for place in inside for key in keys]
    return parts


def show_folder(path: Path) -> str:
    return f"{shorten(path.name, 40)}/"


def find_role_folders(listing: Listing) -> tuple[Path, dict[str, list[tuple[Role, Path]]]]:
    """The folders whose names tell what they hold, and where they are: on top, or all in the one
    folder that has both kinds, such as train/.

    Raises:
        FileError: several folders have them.
    """
    root = listing.root
    on_top = read_folders(listing, root)
    if on_top[TARGET] or on_top[REFERENCE]:
        return root, on_top
    below = {}
    for folder in listing.list_subfolders(root):
        by_role = read_folders(listing, folder)
        if by_role[TARGET] and by_role[REFERENCE]:
            below[folder] = by_role
    if len(below) > 1:
        names = list_some(list(below), root)
        raise FileError(
            "{root} holds several sets ({names}); expected one. Give the folder of the one to "
            "train on.",
            root=shorten(root.name),
            names=names,
        )
    return next(iter(below.items()), (root, on_top))


def read_folders(listing: Listing, base: Path) -> dict[str, list[tuple[Role, Path]]]:
    by_role: dict[str, list[tuple[Role, Path]]] = defaultdict(list)
    for path in listing.list_subfolders(base):
        role = parse_folder(path.name)
        if role is not None and (role.kind == CAPTION or listing.list_folder(path)):
            by_role[role.kind].append((role, path))
    return by_role


def name_captions(part: Parts) -> list[str]:
    """Keys relative to a folder: the pair's own name, then its target's."""
    folder = part.name.rpartition("/")[0]
    stems = [join_key(folder, path.stem) for path in part.targets]
    return list(dict.fromkeys([part.name, *stems]))


def pair_by_name(
    targets: Mapping[str, list[Path]], others: Sequence[tuple[str, int, Mapping[str, list[Path]]]]
) -> list[Parts]:
    """Files of equal name; `a_1` belongs to `a` and `b_start` to `b_end` where no other fits."""
    parts = {key: Parts(key, list(paths)) for key, paths in targets.items()}
    aliases = {strip_role(key): key for key in targets}
    for role, folder, files in others:
        for key, paths in files.items():
            number = _NUMBER.fullmatch(key)
            tries = [key, aliases.get(strip_role(key)), number and number[1]]
            name = next((name for name in tries if name in parts), key)
            part = parts.setdefault(name, Parts(name))
            for path in paths:
                part.add(role, path, (folder, sort_naturally(path.stem)))
    return list(parts.values())


def strip_role(key: str) -> str:
    role = parse_ending(key)
    return key if role is None else role.base
