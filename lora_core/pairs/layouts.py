"""Which files of a folder belong together, in the layouts that trainers of edit models use.

- folders of targets and references, `target/a.png` and `control/a.png`: ai-toolkit, musubi-tuner,
  sd-scripts; the targets may be in the folder itself, with `control/` below it
- endings, `a_start.png` and `a_end.png`, `a.png` and `a-condlabel.png`: fal, T2ITrainer, OneTrainer
- a folder for each pair, `1/before.png` and `1/after.png`: collected by hand
- `metadata.jsonl`, `.csv` or `.json` that names the files: DiffSynth, musubi-tuner, Hugging Face
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .folder_layouts import collect_folders
from .layout_hints import suggest_names
from .listing import Listing, list_files
from .metadata_files import find_list, read_list
from .name_layouts import collect_endings, collect_folder_per_pair, collect_starts
from .pair import MAX_REFERENCES, FoundPairs, IsAllowed, Level, Problem, list_some
from .parts import build_pairs

MAX_MESSAGE = 400


def find_pairs(
    folder: Path, is_allowed: IsAllowed, reference_folders: Sequence[Path] = ()
) -> FoundPairs:
    """The pairs of a folder, and what in it was left out.

    Args:
        is_allowed: called before a file is opened or a link followed; links may lead anywhere.
        reference_folders: one for each reference, if they are not below `folder`.

    Raises:
        FileError: no images, or no layout that is known.
    """
    listing = list_files(folder, is_allowed)
    others = [list_files(path, is_allowed) for path in reference_folders]
    problems = [problem for one in (listing, *others) for problem in one.report_skipped()]
    if reference_folders:
        table = None
        problems += ignore_lists(listing)
    else:
        table, problems_of_lists = find_list(listing, is_allowed)
        problems += problems_of_lists
    try:
        if table is not None:
            found = read_list(table, listing, is_allowed)
        else:
            found = find_layout(listing, others, is_allowed)
    except FileError as e:
        raise FileError(append_problems(e.message, problems)) from None
    return replace(found, problems=(*found.problems, *problems))


def ignore_lists(listing: Listing) -> list[Problem]:
    if not listing.lists:
        return []
    text = message(
        "files that may list pairs, not read together with reference_folders: {num_lists}, "
        "such as {lists}",
        num_lists=len(listing.lists),
        lists=list_some(listing.lists, listing.root, 1),
    )
    return [Problem(Level.NOTE, "list_unused", text, count=len(listing.lists))]


def append_problems(text: str, problems: Sequence[Problem]) -> str:
    """An error with the other problems, the worst first: there is no report to show them."""
    for problem in sorted(problems, key=lambda problem: -problem.level):
        more = message("{text} Besides: {more}.", text=text, more=problem.text)
        text = more if len(more) <= MAX_MESSAGE else text
    return text


def find_layout(listing: Listing, others: Sequence[Listing], is_allowed: IsAllowed) -> FoundPairs:
    """FileError where the names form no pairs."""
    name = shorten(listing.root.name)
    if not listing.num_images:
        raise FileError(
            "{name} holds no images; expected pairs of PNG, JPEG or WebP files with captions. "
            "Put them there, or correct the folder.",
            name=name,
        )
    if listing.num_images == 1 and not others:
        raise FileError(
            "{name} holds one image; expected pairs: a target, one to {max_references} "
            "references and a caption. Add what it is made from.",
            name=name,
            max_references=MAX_REFERENCES,
        )
    for find in (collect_folders, collect_endings, collect_folder_per_pair, collect_starts):
        found = find(listing, others)
        if found is not None:
            layout, parts = found
            return build_pairs(layout, parts, listing, is_allowed)
    paths = [paths[0] for paths in list(listing.images.values())[:3]]
    names = ", ".join(shorten(path.name, 40) for path in paths)
    raise FileError(
        "{name} holds {num_images} images ({names}, ...) whose names form no pairs; {listing}",
        name=name,
        num_images=listing.num_images,
        names=names,
        listing=suggest_names(listing),
    )
