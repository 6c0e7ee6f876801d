"""The files of a folder, by the names that pair them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..disk.writing import explain
from ..errors import FileError
from ..messages import message
from ..text import build_natural_key, shorten
from .images import SUFFIXES
from .pair import CAPTION_SUFFIXES, IsAllowed, Level, Problem, check_allowed, list_some

#: What archives and systems leave behind.
SKIPPED_FOLDERS = ("__MACOSX", "__pycache__")
LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
#: Images and videos that are not read; a pair of them would otherwise vanish silently.
UNREAD_SUFFIXES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpe", ".apng", ".mpo"),
        *(".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".ico", ".icns", ".dds", ".qoi"),
        *(".psd", ".xcf", ".kra", ".svg", ".eps", ".pdf", ".exr", ".hdr", ".avifs", ".jxr"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
        *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
    }
)


def fold(name: str) -> str:
    """The form in which names are compared: case ignored, accents composed.

    Systems and archives encode an accented letter in two ways, as one character or as two.
    """
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def sort_naturally(name: str) -> list:
    """Key under which `a_2` comes before `a_10`, in any case."""
    return build_natural_key(fold(name))


@dataclass
class Listing:
    """The files below a folder; keys are paths without suffix, folded."""

    root: Path
    images: dict[str, list[Path]] = field(default_factory=dict)
    captions: dict[str, list[Path]] = field(default_factory=dict)
    """The files of each key, the preferred one first."""
    lists: list[Path] = field(default_factory=list)
    """Files on top that may list pairs."""
    unread: list[Path] = field(default_factory=list)
    """Images of kinds that are not read."""
    links: list[Path] = field(default_factory=list)
    """To folders, not followed."""
    folders: list[Path] = field(default_factory=list)
    """All that were walked, the root first."""

    @property
    def num_images(self) -> int:
        return sum(map(len, self.images.values()))

    @property
    def files(self) -> list[Path]:
        """All that a set made of this folder depends on."""
        found = [*self.unread, *self.links, *self.lists]
        for paths in (*self.images.values(), *self.captions.values()):
            found += paths
        return found

    def list_folder(self, folder: Path, is_deep: bool = True) -> dict[str, list[Path]]:
        """Images in a folder, and below it if `is_deep`; keys are relative to it."""
        start = make_key(self.root, folder)
        start = "" if start == "." else f"{start}/"
        inside = {
            key[len(start) :]: paths for key, paths in self.images.items() if key.startswith(start)
        }
        return {key: paths for key, paths in inside.items() if is_deep or "/" not in key}

    def list_subfolders(self, folder: Path) -> list[Path]:
        """Those right below a folder that hold images or captions, in natural order."""
        files = [path for paths in self.images.values() for path in paths]
        files += [path for paths in self.captions.values() for path in paths]
        start = "" if str(folder) == "." else os.path.join(folder, "")  # noqa: PTH118
        inside = [str(path)[len(start) :] for path in files if str(path).startswith(start)]
        names = {name.split(os.sep, 1)[0] for name in inside if os.sep in name}
        return [folder / name for name in sorted(names, key=sort_naturally)]

    def find_caption(self, keys: list[str]) -> Path | None:
        """The first that exists; a .json only where no text file is."""
        found = [self.captions[key][0] for key in keys if key in self.captions]
        return next((path for path in found if not is_json(path)), found[0] if found else None)

    def report_skipped(self) -> list[Problem]:
        """What was left out while listing."""
        problems = []
        if self.unread:
            problems.append(
                Problem(
                    Level.WARNING, "pictures_unread", describe_unread(self), count=len(self.unread)
                )
            )
        if self.links:
            text = message(
                "links to folders that are not followed: {num_links}, such as {links}; they "
                "lead outside the allowed folders, in a circle, or are below another link",
                num_links=len(self.links),
                links=list_some(self.links, self.root, 1),
            )
            problems.append(Problem(Level.WARNING, "links_left_out", text, count=len(self.links)))
        return problems


def describe_unread(listing: Listing) -> str:
    suffixes = sorted({path.suffix.lower() for path in listing.unread})
    return message(
        "files of kinds that are not read ({suffixes}): {num_unread}, such as {unread}; "
        "save them as PNG, JPEG or WebP",
        suffixes=", ".join(suffixes[:6]),
        num_unread=len(listing.unread),
        unread=list_some(listing.unread, listing.root, 1),
    )


def list_files(root: Path, is_allowed: IsAllowed) -> Listing:
    """Walks a folder; a link to a folder is followed where that is allowed, one level deep.

    Raises:
        FileError: it cannot be opened.
    """
    listing = Listing(root)
    found: list[str] = []
    linked: list[str] = []

    def fail(error: OSError) -> None:
        name = shorten(Path(error.filename or root).name)
        raise FileError("{name} cannot be opened: {reason}.", name=name, reason=explain(error))

    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        kept = []
        for name in subfolders:
            if name[0] == "." or name in SKIPPED_FOLDERS:
                continue
            path = Path(folder, name)
            if path.is_symlink():
                if not may_follow(path, linked, is_allowed):
                    listing.links.append(path)
                    continue
                linked.append(f"{path}{os.sep}")
            kept.append(name)
        subfolders[:] = kept
        listing.folders.append(Path(folder))
        found += [os.path.join(folder, n) for n in names if not n.startswith(".")]  # noqa: PTH118
    # As strings: pathlib takes ten times as long, which shows with thousands of pairs.
    start = len(os.path.join(root, ""))  # noqa: PTH118
    for name in sorted(found, key=lambda name: sort_naturally(name[start:])):
        path, relative = Path(name), name[start:].replace(os.sep, "/")
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            listing.images.setdefault(fold_key(relative), []).append(path)
        elif suffix in UNREAD_SUFFIXES:
            listing.unread.append(path)
        elif suffix in CAPTION_SUFFIXES:
            listing.captions.setdefault(fold_key(relative), []).append(path)
        if suffix in LIST_SUFFIXES and path.parent == root:
            listing.lists.append(path)
    for paths in listing.captions.values():
        paths.sort(key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()))
    return listing


def may_follow(link: Path, linked: Sequence[str], is_allowed: IsAllowed) -> bool:
    """Not to a folder that contains the link, and not from inside another link: links could
    multiply without end."""
    if str(link).startswith(tuple(linked)):
        return False
    try:
        target = check_allowed(link, is_allowed).resolve(strict=True)
    except (OSError, RuntimeError, FileError):
        return False
    return not link.parent.resolve().is_relative_to(target)


def is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def make_key(root: Path, path: Path) -> str:
    return fold_key(path.relative_to(root).as_posix())


def fold_key(relative: str) -> str:
    """`make_key` of a path relative to the root, with "/" between its parts."""
    stem, suffix = os.path.splitext(relative)  # noqa: PTH122
    is_file = suffix.lower() in SUFFIXES or suffix.lower() in CAPTION_SUFFIXES
    return fold(stem if is_file else relative)
