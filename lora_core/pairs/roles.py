"""Words by which people name what a file or folder is for: `a_start.png`, `control_2`, `before`."""

from __future__ import annotations

import re
from dataclasses import dataclass

TARGET, REFERENCE, CAPTION, MASK = "target", "reference", "caption", "mask"

WORDS = {
    TARGET: (
        *("target", "targets", "tgt", "after", "edited", "result", "results", "output", "outputs"),
        *("end", "gt", "groundtruth", "ground_truth", "final", "dst"),
    ),
    REFERENCE: (
        *("control", "controls", "ctrl", "source", "sources", "src", "reference", "references"),
        *("ref", "refs", "input", "inputs", "before", "original", "originals", "orig", "start"),
        *("condition", "conditions", "conditioning", "cond", "condlabel", "edit_image"),
    ),
    CAPTION: (
        *("caption", "captions", "prompt", "prompts", "instruction", "instructions"),
        *("text", "texts", "txt"),
    ),
    MASK: ("mask", "masks", "masklabel"),
}
#: Folders of targets may have these names too; a file called `a_image.png` has no role.
VAGUE_FOLDERS = ("image", "images", "img", "imgs", "edit", "edits")

_ROLES = {word: role for role, words in WORDS.items() for word in words}
_WORD = "|".join(sorted(map(re.escape, _ROLES), key=len, reverse=True))
_NUMBERED = rf"({_WORD})(?:[ _-]?(?:images?|imgs?|dir))?[ _-]?(\d*)"
_WHOLE = re.compile(_NUMBERED, re.IGNORECASE)
_ENDING = re.compile(rf"(.+?)([ _.-]+{_NUMBERED})", re.IGNORECASE)
_START = re.compile(rf"({_WORD})(\d*)[ _.-]+(.+)", re.IGNORECASE)
_LETTER = re.compile(r"(.+)(_([RT])(\d*))")  # T2ITrainer's endings, capitals only


@dataclass(frozen=True)
class Role:
    """The role that a name states."""

    kind: str
    """TARGET, REFERENCE, CAPTION or MASK."""
    number: int = 0
    base: str = ""
    """The name without the word."""
    word: str = ""
    """As written: "_start", "-condlabel", "control_2"."""


def parse_name(name: str) -> Role | None:
    """`control_2` -> reference number 2; None where the whole name is no role."""
    match = _WHOLE.fullmatch(name)
    if match is None:
        return None
    return Role(_ROLES[match[1].lower()], int(match[2] or 0), "", name)


def parse_ending(name: str) -> Role | None:
    """`a_start2` -> reference number 2 of `a`; None without such an ending."""
    match = _LETTER.fullmatch(name)
    if match is not None:
        kind = TARGET if match[3] == "T" else REFERENCE
        return Role(kind, int(match[4] or 0), match[1], match[2])
    match = _ENDING.fullmatch(name)
    if match is None:
        return None
    return Role(_ROLES[match[3].lower()], int(match[4] or 0), match[1], match[2])


def parse_start(name: str) -> Role | None:
    """`before_cat` -> reference of `cat`, `start-01` of `01`; None where no such word begins it."""
    match = _START.fullmatch(name)
    if match is None:
        return None
    return Role(_ROLES[match[1].lower()], int(match[2] or 0), match[3], match[1])


def parse_folder(name: str) -> Role | None:
    """As the two above; `images` holds targets too."""
    if name.lower() in VAGUE_FOLDERS:
        return Role(TARGET, -1, "", name)
    return parse_name(name) or parse_ending(name)
