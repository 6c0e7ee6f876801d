"""From files that belong together to pairs, and problems with those that do not."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .listing import Listing, fold, is_json, sort_naturally
from .pair import (
    UNUSABLE,
    FoundPairs,
    IsAllowed,
    Level,
    Pair,
    Problem,
    check_references,
    describe_path,
    list_some,
    open_file,
    read_caption,
)
from .roles import MASK, REFERENCE, TARGET

#: Captions with these names are about the folder, not about an image.
NOT_CAPTIONS = re.compile(r"(.*/)?(readme|licen[cs]e|notes?|requirements|info)")
MAX_ODD_SHARE = 0.1  # of the pairs whose number of references differs and may be a mistake


@dataclass
class Parts:
    """The files of one pair while they are collected."""

    name: str
    targets: list[Path] = field(default_factory=list)
    references: list[tuple[tuple, Path]] = field(default_factory=list)
    """(sort key, file)."""
    masks: list[Path] = field(default_factory=list)
    caption_keys: list[str] = field(default_factory=list)
    """Where its caption may be, the likeliest first."""
    fallback_keys: list[str] = field(default_factory=list)
    """Where it may be if it is nowhere else; this is then reported."""

    def add(self, role: str, path: Path, order: tuple = ()) -> None:
        if role == REFERENCE:
            self.references.append((order, path))
        else:
            {TARGET: self.targets, MASK: self.masks}[role].append(path)

    @property
    def reference_paths(self) -> list[Path]:
        """In their order."""
        return [path for _, path in sorted(self.references, key=lambda found: found[0])]

    @property
    def paths(self) -> list[Path]:
        return [*self.targets, *self.reference_paths, *self.masks]


Collected = tuple[str, list[Parts]]
"""(the layout in the user's words, the files of each pair)."""


def join_key(folder: str, name: str) -> str:
    return f"{folder}/{fold(name)}" if folder else fold(name)


def build_pairs(
    layout: str, parts: Sequence[Parts], listing: Listing, is_allowed: IsAllowed
) -> FoundPairs:
    """Opens captions, and reports what is missing or left out."""
    builder = Builder(listing, is_allowed)
    parts = sorted(parts, key=lambda part: sort_naturally(part.name))
    for part in parts:
        try:
            builder.pairs.append(builder.build_pair(part))
        except FileError as e:
            builder.problems.append(Problem(Level.STOP, UNUSABLE, e.message, part.name))
    problems = [
        *builder.problems,
        *builder.report_captions(),
        *report_doubtful_references(parts, listing.root),
        *report_unused_images(parts, listing),
    ]
    return FoundPairs(layout, tuple(builder.pairs), tuple(problems))


class Builder:
    """Builds pairs from parts and records which captions they took, and by which rule."""

    def __init__(self, listing: Listing, is_allowed: IsAllowed):
        self.listing = listing
        self.is_allowed = is_allowed
        self.pairs: list[Pair] = []
        self.problems: list[Problem] = []
        self._used: set[Path] = set()
        self._fallbacks: list[Path] = []
        self._from_json: list[Path] = []
        self._without: list[Path] = []

    def build_pair(self, part: Parts) -> Pair:
        """FileError where files are missing or too many."""
        root = self.listing.root
        caption_path = self._find_caption(part)
        references = part.reference_paths
        if not part.targets:
            names = list_some(references + part.masks, root)
            raise FileError(
                "{names} has no target; add the image it should become, or remove it.", names=names
            )
        if len(part.targets) > 1:
            names = list_some(part.targets, root, 2).replace(", ", " and ", 1)
            raise FileError(
                "{names} are targets of the same name; remove or rename one.", names=names
            )
        name = shorten(describe_path(part.targets[0], root))
        if not references:
            raise FileError(
                "{name} has no reference; add the image it is made from under the same name, or "
                "remove it.",
                name=name,
            )
        check_references(name, len(references))
        return Pair(
            name=restore_case(part.name, part.targets[0].relative_to(root).as_posix()),
            target=open_file(part.targets[0], root, self.is_allowed),
            references=tuple(open_file(path, root, self.is_allowed) for path in references),
            caption=None if caption_path is None else self._read_caption(caption_path),
            mask=open_file(part.masks[0], root, self.is_allowed) if part.masks else None,
        )

    def report_captions(self) -> Iterator[Problem]:
        """Text files that no pair took, and captions taken by a rule that may be wrong."""
        root = self.listing.root
        spare, second, plain_json = [], [], []
        for key, paths in self.listing.captions.items():
            texts = [path for path in paths if not is_json(path)]
            if self._used.isdisjoint(texts):
                spare += [] if NOT_CAPTIONS.fullmatch(key) else texts
            else:
                second += [path for path in texts if path not in self._used]
            # Those on top with other names were checked as lists.
            plain_json += [
                path
                for path in paths
                if is_json(path)
                and path not in self._used
                and (key in self.listing.images or path.parent != root)
            ]
        groups: list[tuple[Level, str, str, list[Path]]] = [
            (Level.WARNING, "captions_unused", message("text files that belong to no pair"), spare),
            (
                Level.WARNING,
                "captions_second",
                message("captions not used, since there is a .txt"),
                second,
            ),
            (Level.NOTE, "json_unused", message(".json files that are not read"), plain_json),
            (
                Level.NOTE,
                "json_without_caption",
                message(".json files without a caption"),
                self._without,
            ),
            (
                Level.NOTE,
                "captions_from_json",
                message("captions read from .json files"),
                self._from_json,
            ),
            (
                Level.NOTE,
                "captions_by_fallback",
                message("captions with no known name"),
                self._fallbacks,
            ),
        ]
        for level, kind, what, paths in groups:
            if paths:
                text = message(
                    "{what}: {num_paths}, such as {paths}",
                    what=what,
                    num_paths=len(paths),
                    paths=list_some(paths, root, 1),
                )
                yield Problem(level, kind, text, count=len(paths))

    def _find_caption(self, part: Parts) -> Path | None:
        path = self.listing.find_caption(part.caption_keys)
        if path is None and part.fallback_keys:
            path = self.listing.find_caption(part.fallback_keys)
            self._fallbacks += [] if path is None else [path]
        if path is not None:
            self._used.add(path)
        return path

    def _read_caption(self, path: Path) -> str | None:
        """A .json next to an image may be anything: an unreadable one is only reported."""
        try:
            caption = read_caption(path, self.is_allowed)
        except FileError as e:
            if not is_json(path):
                raise
            self.problems.append(Problem(Level.WARNING, "json_unreadable", e.message))
            return None
        if is_json(path):
            (self._without if caption is None else self._from_json).append(path)
        return caption


def report_doubtful_references(parts: Sequence[Parts], root: Path) -> list[Problem]:
    """Files that may have become a reference by mistake: leftovers, or a missing one."""
    problems = []
    same: list[Path] = []
    masks: list[Path] = []
    for part in parts:
        by_stem: dict[tuple[Path, str], list[Path]] = defaultdict(list)
        for path in part.reference_paths:
            by_stem[path.parent, fold(path.stem)].append(path)
        same += [path for paths in by_stem.values() if len(paths) > 1 for path in paths]
        masks += part.masks[1:]
    if same:
        text = message(
            "references that differ only in the kind of file, all used: {num_same}, such as "
            "{same}; remove leftover files",
            num_same=len(same),
            same=list_some(same, root, 2),
        )
        problems.append(Problem(Level.WARNING, "references_same_name", text, count=len(same)))
    if masks:
        text = message(
            "second masks of one pair, not used: {num_masks}, such as {masks}",
            num_masks=len(masks),
            masks=list_some(masks, root, 1),
        )
        problems.append(Problem(Level.WARNING, "masks_unused", text, count=len(masks)))
    return problems + report_odd_reference_counts(
        [p for p in parts if p.targets and p.references], root
    )


def report_odd_reference_counts(parts: Sequence[Parts], root: Path) -> list[Problem]:
    """A few pairs with another number of references than the rest."""
    counts = Counter(len(part.references) for part in parts)
    if len(counts) < 2:
        return []
    usual = min(counts, key=lambda number: (-counts[number], number))
    odd = [part for part in parts if len(part.references) != usual]
    if len(odd) > max(1, MAX_ODD_SHARE * len(parts)):
        return []
    first = odd[0]
    text = message(
        "pairs with another number of references than the {usual} of the others: {num_odd}, "
        "such as {first} with {reference_paths}; was a file left over, or is one missing?",
        usual=usual,
        num_odd=len(odd),
        first=shorten(first.name, 40),
        reference_paths=list_some(first.reference_paths, root),
    )
    return [Problem(Level.WARNING, "references_odd", text, count=len(odd))]


def report_unused_images(parts: Sequence[Parts], listing: Listing) -> list[Problem]:
    """Images without any role."""
    taken = {path for part in parts for path in part.paths}
    spare = [path for paths in listing.images.values() for path in paths if path not in taken]
    if not spare:
        return []
    text = message(
        "images that belong to no pair: {num_spare}, such as {spare}",
        num_spare=len(spare),
        spare=list_some(spare, listing.root, 1),
    )
    return [Problem(Level.WARNING, "pictures_unused", text, count=len(spare))]


def restore_case(key: str, path: str) -> str:
    """The part of a path that a key was made of, as the user wrote it."""
    path = unicodedata.normalize("NFC", path)
    folded = fold(path)
    place = folded.rfind(key)
    return path[place : place + len(key)] if len(folded) == len(path) and place >= 0 else key
