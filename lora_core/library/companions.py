"""The files that other programs keep beside an adapter: a preview image and sidecars of facts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Endings of a preview, the first that exists is shown: a1111 and ComfyUI-Lora-Manager write
#: "name.preview.png", Lora-Manager also "name.webp", others "name.png" and "name.jpg".
PREVIEW_ENDINGS = tuple(
    f"{middle}{suffix}"
    for middle in (".preview", "")
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif")
)
#: Endings of the sidecars, the one with the most facts first; see `sidecars`.
SIDECAR_ENDINGS = (".metadata.json", ".civitai.info", ".json")
#: Of a preview's file; a PNG of 4096 x 4096 pixels has 50 MB before compression.
MAX_PREVIEW_BYTES = 64 << 20


@dataclass(frozen=True)
class Companions:
    """Names of the regular files beside an adapter; a link's target may be anywhere."""

    preview: str = ""
    preview_version: str = ""
    """Changes with the preview's file, so that a browser may keep it."""
    sidecars: tuple[str, ...] = ()


NO_COMPANIONS = Companions()


def list_companions(files: Iterable[Path]) -> dict[Path, Companions]:
    """The companions of each adapter that has any; every folder is read once."""
    folders: dict[Path, Mapping[str, str]] = {}
    found = {}
    for path in files:
        if path.parent not in folders:
            folders[path.parent] = list_names(path.parent)
        names, stem = folders[path.parent], path.stem
        previews = [names[n] for end in PREVIEW_ENDINGS if (n := f"{stem}{end}") in names]
        sidecars = tuple(names[n] for end in SIDECAR_ENDINGS if (n := f"{stem}{end}") in names)
        preview, version = next(
            ((name, v) for name in previews if (v := read_version(path.with_name(name)))), ("", "")
        )
        if preview or sidecars:
            found[path] = Companions(preview, version, sidecars)
    return found


def list_names(folder: Path) -> dict[str, str]:
    """Name with its last ending in lower case -> name, of the files that could be companions."""
    endings = tuple({os.path.splitext(end)[1] for end in (*PREVIEW_ENDINGS, *SIDECAR_ENDINGS)})  # noqa: PTH122
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, ending = os.path.splitext(entry.name)  # noqa: PTH122 - for thousands of names
                if ending.lower() in endings and entry.is_file(follow_symlinks=False):
                    found[f"{stem}{ending.lower()}"] = entry.name
    except OSError:  # removed meanwhile
        return {}
    return found


def read_version(path: Path) -> str:
    """ "" for a file that is gone, empty, or larger than any preview."""
    try:
        status = path.lstat()
    except OSError:
        return ""
    if not 0 < status.st_size <= MAX_PREVIEW_BYTES:
        return ""
    text = f"{path.name} {status.st_mtime_ns} {status.st_size}"
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
