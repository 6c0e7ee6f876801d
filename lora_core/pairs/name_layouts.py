"""Pairs by file names: an ending, a beginning, or the whole name in a folder for each pair."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..messages import message
from ..text import shorten
from .listing import Listing, make_key
from .parts import NOT_CAPTIONS, Collected, Parts, join_key
from .roles import CAPTION, REFERENCE, TARGET, Role, parse_ending, parse_name, parse_start

# --- endings --------------------------------------------------------------------------------------


def collect_endings(listing: Listing, _: Sequence[Listing]) -> Collected | None:
    """`a_start.png` and `a_end.png`, or `a.png` and `a_control.png`."""
    named: dict[str, list[tuple[Role, str]]] = defaultdict(list)
    bare: list[str] = []
    endings: Counter[tuple[str, str]] = Counter()
    for key, paths in listing.images.items():
        role = parse_ending(paths[0].stem)
        if role is None or role.kind == CAPTION:
            bare.append(key)
            continue
        named[join_key(key.rpartition("/")[0], role.base)].append((role, key))
        endings[role.kind, role.word.rstrip("0123456789")] += len(paths)
    parts = {part.name: part for part in build_numbered(named, listing)}
    for key in bare:  # the target, where the others have roles
        parts.setdefault(key, Parts(key)).targets += listing.images[key]
    return finish_named("endings", endings, "no ending", parts.values(), listing)


def build_numbered(
    named: Mapping[str, Sequence[tuple[Role, str]]], listing: Listing
) -> list[Parts]:
    """Files by the name they share. `a_start1`, `a_end1`, `a_start2`, `a_end2` are two pairs, but
    `a_start1`, `a_start2`, `a_end` are one with two references."""
    parts: list[Parts] = []
    for base, found in named.items():
        numbers = [role.number for role, _ in found if role.kind == TARGET]
        references = {role.number for role, _ in found if role.kind == REFERENCE}
        is_many = len(numbers) > 1 and len(set(numbers)) == len(numbers)
        is_many = is_many and references.issuperset(numbers)
        made: dict[str, Parts] = {}
        for role, key in found:
            name = f"{base} {role.number}" if is_many else base
            part = made.setdefault(name, Parts(name))
            for path in listing.images[key]:
                part.add(role.kind, path, (role.number,))
            part.caption_keys.append(key)
        parts += made.values()
    return parts


def finish_named(
    noun: str,
    words: Counter[tuple[str, str]],
    no_word: str,
    parts: Collection[Parts],
    listing: Listing,
) -> Collected | None:
    """The layout's name, with the words that made it, and where each pair's caption may be.

    Args:
        words: how often each (kind, word) occurred.
        no_word: used for a target's word where there was none.
    """
    if not any(part.targets and part.references for part in parts):
        return None
    put_target_first(parts, listing)
    for part in parts:
        part.caption_keys.insert(0, part.name)
    references, targets = (
        " or ".join([shorten(w, 30) for (k, w), _ in words.most_common() if k == kind][:4])
        for kind in (REFERENCE, TARGET)
    )
    return message(
        "{noun}: {references} for references, {targets} for targets",
        noun=noun,
        references=references,
        targets=targets or no_word,
    ), list(parts)


def put_target_first(parts: Iterable[Parts], listing: Listing) -> None:
    """Of the places of a caption."""
    for part in parts:
        targets = {make_key(listing.root, path) for path in part.targets}
        part.caption_keys.sort(key=lambda key: key not in targets)


# --- a folder for each pair -----------------------------------------------------------------------


def collect_folder_per_pair(listing: Listing, others: Sequence[Listing]) -> Collected | None:
    """`1/before.png`, `1/after.png`, `1/prompt.txt`."""
    parts: dict[str, Parts] = {}
    for key, paths in listing.images.items():
        folder = key.rpartition("/")[0]
        role = parse_name(paths[0].stem)
        if folder and role is not None and role.kind != CAPTION:
            part = parts.setdefault(folder, Parts(folder))
            for path in paths:
                part.add(role.kind, path, (role.number,))
    if not any(part.targets and part.references for part in parts.values()):
        return None
    if any(len({path.stem for path in part.targets}) > 1 for part in parts.values()):
        several = collect_starts(listing, others)  # start-01, end-01, start-02, end-02
        if several is not None:
            return several
    words: dict[str, list[str]] = defaultdict(list)
    others_by_folder: dict[str, list[str]] = defaultdict(list)
    for key in listing.captions:
        folder, _, name = key.rpartition("/")
        if folder in parts:
            role = parse_name(name)
            is_word = role is not None and role.kind == CAPTION
            (words if is_word else others_by_folder)[folder].append(key)
    for name, part in parts.items():
        targets = [make_key(listing.root, path) for path in part.targets]
        part.caption_keys += [*words[name], *targets, name]
        part.fallback_keys += sorted(
            others_by_folder[name], key=lambda key: bool(NOT_CAPTIONS.fullmatch(key))
        )
    return message("a folder for each pair"), list(parts.values())


# --- the word first -------------------------------------------------------------------------------


def collect_starts(listing: Listing, _: Sequence[Listing]) -> Collected | None:
    """`before_1.png` and `after_1.png`, `start-cat.png` and `end-cat.png`."""
    parts: dict[str, Parts] = {}
    words: Counter[tuple[str, str]] = Counter()
    for key, paths in listing.images.items():
        role = parse_start(paths[0].stem)
        if role is None or role.kind == CAPTION:
            continue
        base = join_key(key.rpartition("/")[0], role.base)
        part = parts.setdefault(base, Parts(base))
        for path in paths:
            part.add(role.kind, path, (role.number,))
        part.caption_keys.append(key)
        words[role.kind, role.word.lower()] += len(paths)
    return finish_named("beginnings", words, "", parts.values(), listing)
