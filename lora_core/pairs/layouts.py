"""Which files of a folder belong together, in the layouts that trainers of edit models use.

- folders of targets and references, `target/a.png` and `control/a.png`: ai-toolkit, musubi-tuner,
  sd-scripts; the targets may lie in the folder itself, with `control/` below it
- endings, `a_start.png` and `a_end.png`, `a.png` and `a-condlabel.png`: fal, T2ITrainer, OneTrainer
- a folder for each pair, `1/before.png` and `1/after.png`: collected by hand
- `metadata.jsonl`, `.csv` or `.json` that names the files: DiffSynth, musubi-tuner, Hugging Face
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError
from ..stored import shorten
from .listing import Listing, list_files, make_key, sort_naturally
from .metadata_files import find_metadata, read_metadata
from .pair import (
    MAX_REFERENCES,
    FoundPairs,
    IsAllowed,
    Level,
    Pair,
    Problem,
    check_references,
    describe_path,
    open_file,
    read_caption,
)
from .roles import CAPTION, MASK, REFERENCE, TARGET, Role, parse_ending, parse_folder, parse_name

_NUMBER = re.compile(r"(.+)[ _-](\d+)")
#: Captions with these names are about the folder, not about a picture.
NOT_CAPTIONS = re.compile(r"(.*/)?(readme|licen[cs]e|notes?|requirements|info)")


@dataclass
class Parts:
    """The files of one pair while they are collected."""

    name: str
    targets: list[Path] = field(default_factory=list)
    references: list[tuple[tuple, Path]] = field(default_factory=list)
    """(what they are ordered by, file)."""
    masks: list[Path] = field(default_factory=list)
    caption_keys: list[str] = field(default_factory=list)
    """Where its caption may be, the likeliest first."""

    def add(self, role: str, path: Path, order: tuple = ()) -> None:
        if role == REFERENCE:
            self.references.append((order, path))
        else:
            {TARGET: self.targets, MASK: self.masks}[role].append(path)


def find_pairs(
    folder: Path, is_allowed: IsAllowed, reference_folders: Sequence[Path] = ()
) -> FoundPairs:
    """The pairs of a folder.

    Args:
        is_allowed: asked before a file is opened; links may lead anywhere.
        reference_folders: one for each reference, if they are not below `folder`.

    Raises:
        FileError: no pictures, or no layout that is known.
    """
    listing = list_files(folder)
    metadata = None if reference_folders else find_metadata(folder, is_allowed)
    if metadata is not None:
        return read_metadata(metadata, folder, is_allowed)
    if not listing.num_pictures:
        raise FileError(
            f"{shorten(folder.name)} holds no pictures; expected pairs of PNG, JPEG or WebP files "
            "with captions. Put them there, or correct the folder."
        )
    if listing.num_pictures == 1 and not reference_folders:
        raise FileError(
            f"{shorten(folder.name)} holds one picture; expected pairs: a target, one to "
            f"{MAX_REFERENCES} references and a caption. Add what it is made from."
        )
    for find in (collect_folders, collect_endings, collect_folder_per_pair):
        found = find(listing, reference_folders)
        if found is not None:
            layout, parts = found
            return build_pairs(layout, parts, listing, is_allowed)
    names = [shorten(paths[0].name, 40) for paths in list(listing.pictures.values())[:3]]
    raise FileError(
        f"{shorten(folder.name)} holds {listing.num_pictures} pictures ({', '.join(names)}, ...) "
        "whose names form no pairs; expected folders such as 'target' and 'control' with equal "
        "names in both, endings such as 'a_start.png' and 'a_end.png', or a metadata.jsonl."
    )


Collected = tuple[str, list[Parts]]


# --- folders of targets and references ------------------------------------------------------------


def collect_folders(listing: Listing, reference_folders: Sequence[Path]) -> Collected | None:
    """Targets in one folder, references in others, paired by name."""
    root = listing.root
    by_role: dict[str, list[tuple[Role, Path]]] = defaultdict(list)
    for path in sorted(root.iterdir(), key=lambda path: sort_naturally(path.name)):
        role = parse_folder(path.name) if path.is_dir() and not path.is_symlink() else None
        if role is not None and (role.kind == CAPTION or listing.list_folder(path)):
            by_role[role.kind].append((role, path))
    targets = by_role[TARGET]
    if len(targets) > 1:  # `images` only where nothing says target
        targets = [found for found in targets if found[0].number >= 0] or targets
    if len(targets) > 1:
        names = " and ".join(path.name for _, path in targets)
        raise FileError(
            f"{shorten(root.name)} holds several folders of targets ({names}); expected one. "
            "Rename or remove the others."
        )
    references = sorted(by_role[REFERENCE], key=lambda found: found[0].number)
    folders = list(reference_folders) or [path for _, path in references]
    if not folders:
        return None
    if targets:
        target_folder, pictures = targets[0][1], listing.list_folder(targets[0][1])
    else:
        taken = {path for found in by_role.values() for _, path in found}
        target_folder = root
        pictures = {
            key: paths
            for key, paths in listing.list_folder(root).items()
            if not any(paths[0].is_relative_to(path) for path in taken)
        }
    if not pictures:
        return None
    others = [(REFERENCE, number, list_other(listing, path)) for number, path in enumerate(folders)]
    others += [(MASK, 0, listing.list_folder(path)) for _, path in by_role[MASK]]
    places = [target_folder, *(path for _, path in by_role[CAPTION]), root, *folders]
    parts = pair_by_name(pictures, others)
    for part in parts:
        part.caption_keys = [
            make_key(root, place / key)
            for place in places
            if place.is_relative_to(root)
            for key in name_captions(part)
        ]
    where = "the folder itself" if target_folder == root else f"{target_folder.name}/"
    names = ", ".join(f"{path.name}/" for path in folders)
    return f"targets in {where}, references in {names}", parts


def list_other(listing: Listing, folder: Path) -> dict[str, list[Path]]:
    if folder.is_relative_to(listing.root):
        return listing.list_folder(folder)
    return list_files(folder).pictures


def name_captions(part: Parts) -> list[str]:
    """Keys relative to a folder: the pair's own name, then its target's."""
    stems = [path.stem.casefold() for path in part.targets]
    folder = part.name.casefold().rpartition("/")[0]
    return list(
        dict.fromkeys(
            [part.name.casefold(), *(f"{folder}/{stem}" if folder else stem for stem in stems)]
        )
    )


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


# --- endings --------------------------------------------------------------------------------------


def collect_endings(listing: Listing, _: Sequence[Path]) -> Collected | None:
    """`a_start.png` and `a_end.png`, or `a.png` and `a_control.png`."""
    parts: dict[str, Parts] = {}
    bare: dict[str, list[Path]] = {}
    endings: Counter[tuple[str, str]] = Counter()
    for key, paths in listing.pictures.items():
        folder = key.rpartition("/")[0]
        role = parse_ending(paths[0].stem)
        if role is None or role.kind == CAPTION:
            bare[key] = paths
            continue
        base = "/".join(filter(None, [folder, role.base.casefold()]))
        part = parts.setdefault(base, Parts(base))
        for path in paths:
            part.add(role.kind, path, (role.number,))
        part.caption_keys.append(key)
        endings[role.kind, role.ending.rstrip("0123456789")] += len(paths)
    for key, paths in bare.items():  # the target, where the others say what they are
        parts.setdefault(key, Parts(key)).targets += paths
    if not any(part.targets and part.references for part in parts.values()):
        return None
    for part in parts.values():
        targets = {make_key(listing.root, path) for path in part.targets}
        part.caption_keys.sort(key=lambda key: key not in targets)
        part.caption_keys.insert(0, part.name)
    shown = {
        kind: " or ".join(e for (k, e), _ in endings.most_common() if k == kind)
        for kind in (TARGET, REFERENCE)
    }
    target = shown[TARGET] or "no ending"
    return f"endings: {shown[REFERENCE]} for references, {target} for targets", list(parts.values())


# --- a folder for each pair -----------------------------------------------------------------------


def collect_folder_per_pair(listing: Listing, _: Sequence[Path]) -> Collected | None:
    """`1/before.png`, `1/after.png`, `1/prompt.txt`."""
    parts: dict[str, Parts] = {}
    for key, paths in listing.pictures.items():
        folder = key.rpartition("/")[0]
        role = parse_name(paths[0].stem)
        if folder and role is not None and role.kind != CAPTION:
            part = parts.setdefault(folder, Parts(folder))
            for path in paths:
                part.add(role.kind, path, (role.number,))
    if not any(part.targets and part.references for part in parts.values()):
        return None
    for key in listing.captions:
        folder = key.rpartition("/")[0]
        if folder in parts:
            parts[folder].caption_keys.append(key)
    for name, part in parts.items():
        part.caption_keys.append(name)
    return "a folder for each pair", list(parts.values())


# --- from files to pairs --------------------------------------------------------------------------


def build_pairs(
    layout: str, parts: Sequence[Parts], listing: Listing, is_allowed: IsAllowed
) -> FoundPairs:
    """Opens captions, and says what is missing."""
    pairs, problems, used = [], [], set()
    for part in sorted(parts, key=lambda part: sort_naturally(part.name)):
        caption_path = listing.find_caption(part.caption_keys)
        used.add(caption_path)
        try:
            pairs.append(build_pair(part, caption_path, listing.root, is_allowed))
        except FileError as e:
            problems.append(Problem(Level.STOP, str(e), part.name))
    unused = [
        path.name
        for key, path in listing.captions.items()
        if path not in used and not NOT_CAPTIONS.fullmatch(key)
    ]
    if unused:
        problems.append(
            Problem(
                Level.WARNING,
                f"text files that belong to no pair: {len(unused)}, such as {shorten(unused[0])}",
            )
        )
    return FoundPairs(layout, tuple(pairs), tuple(problems))


def build_pair(part: Parts, caption_path: Path | None, root: Path, is_allowed: IsAllowed) -> Pair:
    """FileError where files are missing or too many."""
    references = [path for _, path in sorted(part.references, key=lambda found: found[0])]
    if not part.targets:
        names = ", ".join(describe_path(path, root) for path in references + part.masks)
        raise FileError(f"{names} has no target; add the picture it shall become, or remove it.")
    if len(part.targets) > 1:
        names = " and ".join(describe_path(path, root) for path in part.targets)
        raise FileError(f"{names} are targets of the same name; remove or rename one.")
    name = shorten(describe_path(part.targets[0], root))
    if not references:
        raise FileError(
            f"{name} has no reference; add the picture it is made from under the same name, or "
            "remove it."
        )
    check_references(name, len(references))
    return Pair(
        name=restore_case(part.name, part.targets[0].relative_to(root).as_posix()),
        target=open_file(part.targets[0], root, is_allowed),
        references=tuple(open_file(path, root, is_allowed) for path in references),
        caption=None if caption_path is None else read_caption(caption_path, is_allowed),
        mask=open_file(part.masks[0], root, is_allowed) if part.masks else None,
    )


def restore_case(key: str, path: str) -> str:
    """The part of a path that a key was made of, as the user wrote it."""
    place = path.casefold().rfind(key)
    same_length = len(path.casefold()) == len(path)
    return path[place : place + len(key)] if same_length and place >= 0 else key
