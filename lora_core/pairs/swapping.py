"""Signs that targets and references are swapped. Signs only: each becomes a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..messages import message
from ..text import shorten
from .facts import PairFacts
from .images import FileImage, ImageSource
from .listing import fold
from .pair import Level, Pair, Problem
from .roles import REFERENCE, TARGET, parse_ending, parse_name

MIN_SHARE = 0.5  # of the pairs a sign applies to
MIN_PAIRS_SHARED = 3  # one image with several others
MIN_RATIO = 1.5  # of saturation or detail, to call one side the stronger

#: Words of an instruction -> what a target should have more of than its reference.
MORE_COLOUR = re.compile(r"\b(colou?ri[sz]e|add colou?rs?|make it colou?rful)\b", re.IGNORECASE)
LESS_COLOUR = re.compile(
    r"\b(black[- ]and[- ]white|gr[ea]yscale|monochrome|desaturate|b&w)\b", re.IGNORECASE
)
MORE_DETAIL = re.compile(
    r"\b(deblur|sharpen|upscale|super[- ]resolution|denoise|restore|enhance the details?)\b",
    re.IGNORECASE,
)
LESS_DETAIL = re.compile(r"\b(blur|smooth out|make it blurry|soften)\b", re.IGNORECASE)


def find_swaps(pairs: Sequence[Pair], facts: Sequence[PairFacts]) -> list[Problem]:
    """At most one question per kind of sign."""
    found = [ask_about_names(pairs), ask_about_sharing(facts), ask_about_captions(pairs, facts)]
    return [Problem(Level.QUESTION, "swapped", text) for text in found if text]


def ask_about_names(pairs: Sequence[Pair]) -> str | None:
    """Targets that are called source, and references that are called target."""
    wrong = [
        pair for pair in pairs if any(is_wrong(pair.target, other) for other in pair.references)
    ]
    if len(wrong) <= MIN_SHARE * len(pairs):
        return None
    pair = wrong[0]
    return message(
        "Are targets and references swapped? {target} is taken as the target and {name} as "
        "what it is made from, in {num_wrong} of {num_pairs} pairs",
        target=shorten(pair.target.name),
        name=shorten(pair.references[0].name),
        num_wrong=len(wrong),
        num_pairs=len(pairs),
    )


def is_wrong(target: ImageSource, reference: ImageSource) -> bool:
    """Whether one is named as the other's role. Where both files have the same name, such as
    x_original.png, it is no sign and only their folders count."""
    paths = [image.path for image in (target, reference) if isinstance(image, FileImage)]
    if len(paths) < 2:
        return False
    own = [read_file_role(path) for path in paths]
    if own[0] == own[1] or fold(paths[0].stem) == fold(paths[1].stem):
        own = [None, None]
    roles = [role or read_folder_role(path) for role, path in zip(own, paths, strict=True)]
    return roles[0] == REFERENCE or roles[1] == TARGET


def read_file_role(path: Path) -> str | None:
    role = parse_ending(path.stem) or parse_name(path.stem)
    return None if role is None else role.kind


def read_folder_role(path: Path) -> str | None:
    role = parse_name(path.parent.name)
    return None if role is None else role.kind


def ask_about_sharing(facts: Sequence[PairFacts]) -> str | None:
    """One reference often has several targets; one target with several references is rare."""
    targets = {pair.target.digest for pair in facts}
    references = {pair.references[0].digest for pair in facts}
    if len(facts) < MIN_PAIRS_SHARED or len(targets) > MIN_SHARE * len(facts):
        return None
    if len(references) <= len(targets):
        return None
    return message(
        "Are targets and references swapped? {num_facts} pairs have only {num_targets} "
        "different targets but {num_references} different references, so different images "
        "should become the same one",
        num_facts=len(facts),
        num_targets=len(targets),
        num_references=len(references),
    )


def ask_about_captions(pairs: Sequence[Pair], facts: Sequence[PairFacts]) -> str | None:
    """Captions that ask for colour while the colour is in the reference, and the like."""
    rules = (
        (message("colour"), MORE_COLOUR, LESS_COLOUR, "saturation"),
        (message("detail"), MORE_DETAIL, LESS_DETAIL, "detail"),
    )
    for what, more, less, measure in rules:
        asked = 0
        against: list[tuple[Pair, str]] = []
        for pair, known in zip(pairs, facts, strict=True):
            caption = pair.caption or ""
            wants_more, wants_less = bool(more.search(caption)), bool(less.search(caption))
            if wants_more == wants_less:
                continue
            asked += 1
            target = getattr(known.target, measure) + 1e-4
            reference = getattr(known.references[0], measure) + 1e-4
            ratio = reference / target if wants_more else target / reference
            if ratio > MIN_RATIO:
                against.append((pair, caption))
        if asked and len(against) > MIN_SHARE * asked:
            pair, caption = against[0]
            return message(
                "Are targets and references swapped? Captions such as {caption!r} do not "
                "fit the {what} of {target} and {name}, in {num_against} of {asked} pairs",
                caption=shorten(caption),
                what=what,
                target=shorten(pair.target.name),
                name=shorten(pair.references[0].name),
                num_against=len(against),
                asked=asked,
            )
    return None
