"""Checks every pair before any is encoded: what would ruin a run, what may be a mistake."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, FileError
from ..findings import SEVERITIES, Finding
from ..messages import join_messages, message
from ..progress import Progress, ShouldStop, track
from ..text import shorten
from .facts import ImageFacts, PairFacts, have_same_pixels, measure_pair
from .images import ImageSource
from .pair import UNUSABLE, FoundPairs, Level, Pair, Problem, clean_caption
from .sizes import Size, check_megapixels, choose_target_size
from .swapping import find_swaps

STOP, LEAVE_OUT = "stop", "leave the pair out"
ON_PROBLEM = (STOP, LEAVE_OUT)

MAX_ASPECT_DIFFERENCE = 0.02  # between a target and its first reference
MAX_ASPECT = 4.0
MIN_SHARE_OF_AREA = 0.5  # of the trained size a target should have
MIN_MASK_SHARE = 1e-6
MAX_MESSAGE = 400  # letters of an error, all its lines together
#: Would be read as part of the prompt's template.
TEMPLATE_TOKEN = re.compile(r"<\|[a-z_]+\|>")
PLACEHOLDER = re.compile(r"\[(trigger|name)\]")
#: What programs write where they had no text, or several.
NOT_TEXT = re.compile(r"\[['\"].*['\"]\]|\{['\"].*\}|nan|none|null", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class CheckedPair:
    """A pair that can be encoded."""

    pair: Pair
    facts: PairFacts
    size: Size
    """(width, height) its target is encoded at."""


@dataclass(frozen=True)
class Preflight:
    """The result of the checks."""

    name: str
    layout: str
    pairs: tuple[CheckedPair, ...]
    """Those that can be used."""
    problems: tuple[Problem, ...]
    num_found: int
    """Pairs, the unusable ones included."""

    @property
    def stops(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == Level.STOP)

    @property
    def needs_attention(self) -> bool:
        return any(problem.level >= Level.WARNING for problem in self.problems)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One for each kind and severity, the worst first; the text is that of the first."""
        firsts: dict[tuple[str, str], str] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for problem in self.problems:
            key = problem.kind, problem.level.severity
            firsts.setdefault(key, problem.text)
            counts[key] += problem.count
        found = [
            Finding(kind, severity, text, counts[kind, severity])
            for (kind, severity), text in firsts.items()
        ]
        return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; "findings" are for programs: kind, severity, text, count."""
        return {
            "name": self.name,
            "layout": self.layout,
            "num_pairs": len(self.pairs),
            "num_found": self.num_found,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def raise_stops(self) -> None:
        """ConfigError with one sentence, then as many of the other problems as fit, a line each."""
        stops = self.stops
        if not stops:
            return
        first, *others = [problem.text for problem in stops]
        lines = [first]
        if others:
            lines.append(message("More problems that stop the run: {count}", count=len(others)))
        for number, text in enumerate(others, 1):
            end = [] if number == len(others) else ["..."]
            if len(join_messages("\n", [*lines, text, *end])) > MAX_MESSAGE:
                lines.append("...")
                break
            lines.append(text)
        raise ConfigError(join_messages("\n", lines))


def check_pairs(
    found: FoundPairs,
    *,
    name: str,
    megapixels: float,
    max_references: int,
    default_caption: str = "",
    on_problem: str = STOP,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Preflight:
    """Decodes every image once, one at a time.

    Args:
        megapixels: area the targets are trained at, in units of 1024 x 1024.
        max_references: as many as the model variant takes.
        default_caption: for pairs without a caption.
        on_problem: LEAVE_OUT turns a pair that cannot be used into a warning.

    Raises:
        ConfigError: `megapixels` is not an area.
    """
    check_megapixels(megapixels, "megapixels")
    problems = list(found.problems)
    known: dict[int | str, ImageFacts] = {}
    checked: list[CheckedPair] = []
    for pair in track(found.pairs, progress, should_stop, message("check of the pairs")):
        one, its_problems = check_pair(pair, known, megapixels, max_references, default_caption)
        checked += [] if one is None else [one]
        problems += its_problems
    checked, repeats = drop_repeats(checked)
    problems += repeats
    problems += inspect_set(checked, name)
    num_found = len(found.pairs) + sum(p.level == Level.STOP for p in found.problems)
    if on_problem == LEAVE_OUT:
        problems = [leave_out(problem) for problem in problems]
        lost = {problem.pair for problem in problems if problem.kind == LEFT_OUT}
        checked = [one for one in checked if one.pair.name not in lost]
        if not checked:
            text = message("no pair of {name} can be used", name=shorten(name))
            problems.append(Problem(Level.STOP, "no_pairs", text))
    elif not checked and not any(problem.level == Level.STOP for problem in problems):
        problems.append(
            Problem(Level.STOP, "no_pairs", message("{name} holds no pairs", name=shorten(name)))
        )
    problems.sort(key=lambda problem: -problem.level)
    return Preflight(name, found.layout, tuple(checked), tuple(problems), num_found)


def check_pair(
    pair: Pair,
    known: dict[int | str, ImageFacts],
    megapixels: float,
    max_references: int,
    default_caption: str = "",
) -> tuple[CheckedPair | None, list[Problem]]:
    """One pair by itself, None if it cannot be used, and its problems.

    Args:
        known: facts of images decoded before; see `measure_pair`.
    """
    try:
        pair = complete_pair(pair, default_caption, max_references)
        facts = measure_pair(pair, known)
        check_mask(pair)
    except FileError as e:
        return None, [Problem(Level.STOP, UNUSABLE, e.message, pair.name)]
    size = choose_target_size(facts.target.width, facts.target.height, megapixels)
    return CheckedPair(pair, facts, size), inspect_pair(pair, facts, size)


#: Kind of a problem for which a pair was left out.
LEFT_OUT = "pair_left_out"


def leave_out(problem: Problem) -> Problem:
    if problem.level != Level.STOP or problem.pair is None:
        return problem
    text = message("Left out: {text}", text=problem.text)
    return replace(problem, level=Level.WARNING, kind=LEFT_OUT, text=text)


def complete_pair(pair: Pair, default_caption: str, max_references: int) -> Pair:
    """FileError for a pair without a caption, or with more references than the model takes."""
    target = shorten(pair.target.name)
    if len(pair.references) > max_references:
        raise FileError(
            "{target} has {num_references} references, but the original Qwen-Image-Edit takes "
            "one; choose the variant 2509 / 2511, or remove the others.",
            target=target,
            num_references=len(pair.references),
        )
    caption = clean_caption(default_caption) if pair.caption is None else pair.caption
    if pair.caption is None and not caption:
        raise FileError(
            "{target} has no caption; write the instruction into a .txt file of that name, or "
            "one for all into captions.",
            target=target,
        )
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise FileError(
            "the caption of {target} holds half of a surrogate pair, which is not a character; "
            "write it again.",
            target=target,
        ) from None
    return replace(pair, caption=caption)


def check_mask(pair: Pair) -> None:
    if pair.mask is not None and measure_brightness(pair.mask) < MIN_MASK_SHARE:
        raise FileError(
            "{mask} is entirely black, so that nothing of {target} would count; paint white "
            "what should count, or remove the mask.",
            mask=shorten(pair.mask.name),
            target=shorten(pair.target.name),
        )


def measure_brightness(image: ImageSource) -> float:
    """Mean of all pixels, 0 to 1."""
    total, number = 0.0, 0
    for band in image.read_bands():
        total += float(band.sum(dtype=np.float64))
        number += band.size
    return total / number


# --- one pair -------------------------------------------------------------------------------------


def inspect_pair(pair: Pair, facts: PairFacts, size: Size) -> list[Problem]:
    found: list[Problem] = []
    add = make_adder(found, pair.name)
    images = [facts.target, *facts.references, *([facts.mask] if facts.mask else [])]
    for image, known in zip(pair.images, images, strict=True):
        if known.traits:
            text = message(
                "{image} is {traits}",
                image=shorten(image.name),
                traits=join_messages(", ", known.traits),
            )
            add(Level.NOTE, "converted", text)
        if max(known.aspect, 1 / known.aspect) > MAX_ASPECT:
            add(
                Level.WARNING,
                "strip",
                message(
                    "{image} is {width} x {height} px, a strip; crop it",
                    image=shorten(image.name),
                    width=known.width,
                    height=known.height,
                ),
                "a strip",
            )
    for image, known in zip(pair.references, facts.references, strict=True):
        if known.digest == facts.target.digest or (
            (known.width, known.height) == (facts.target.width, facts.target.height)
            and known.looks_like(facts.target)
            and have_same_pixels(image, pair.target)
        ):
            add(
                Level.WARNING,
                "same_picture",
                message(
                    "{target} and {image} are the same image; this pair teaches the model to "
                    "change nothing",
                    target=shorten(pair.target.name),
                    image=shorten(image.name),
                ),
                "target = reference",
            )
    return [*found, *inspect_sizes(pair, facts, size), *inspect_caption(pair)]


def inspect_sizes(pair: Pair, facts: PairFacts, size: Size) -> list[Problem]:
    found: list[Problem] = []
    add = make_adder(found, pair.name)
    target, first = facts.target, facts.references[0]
    if abs(target.aspect / first.aspect - 1) > MAX_ASPECT_DIFFERENCE:
        add(
            Level.WARNING,
            "other_proportions",
            message(
                "{target} is {width} x {height} px and its reference {other_width} x "
                "{other_height}: other proportions teach a shift or zoom",
                target=shorten(pair.target.name),
                width=target.width,
                height=target.height,
                other_width=first.width,
                other_height=first.height,
            ),
            "other proportions",
        )
    if target.width * target.height < MIN_SHARE_OF_AREA * size[0] * size[1]:
        add(
            Level.WARNING,
            "enlarged",
            message(
                "{target} is {width} x {height} px and would be enlarged to {new_width} x "
                "{new_height}; lower megapixels or use larger images",
                target=shorten(pair.target.name),
                width=target.width,
                height=target.height,
                new_width=size[0],
                new_height=size[1],
            ),
            "small: enlarged",
        )
    return found


def inspect_caption(pair: Pair) -> list[Problem]:
    found: list[Problem] = []
    add = make_adder(found, pair.name)
    caption = pair.caption or ""
    if not caption:
        text = message("the caption of {target} is empty", target=shorten(pair.target.name))
        add(Level.WARNING, "caption_empty", text, "empty caption")
    if NOT_TEXT.fullmatch(caption):
        add(
            Level.WARNING,
            "caption_not_text",
            message(
                "the caption of {target} is {caption}, which looks like the output of a "
                "program; write the instruction there",
                target=shorten(pair.target.name),
                caption=shorten(caption, 40),
            ),
            "caption is not text",
        )
    token = TEMPLATE_TOKEN.search(caption)
    if token:
        add(
            Level.STOP,
            "template_token",
            message(
                "the caption of {target} holds {token}, which belongs to the prompt's template; "
                "remove it",
                target=shorten(pair.target.name),
                token=token[0],
            ),
            "template token in caption",
        )
    placeholder = PLACEHOLDER.search(caption)
    if placeholder:
        add(
            Level.WARNING,
            "placeholder",
            message(
                "the caption of {target} holds {placeholder}, which is used unchanged; write "
                "the trigger word there",
                target=shorten(pair.target.name),
                placeholder=placeholder[0],
            ),
            "placeholder in caption",
        )
    return found


Adder = Callable[..., None]
"""Takes (level, kind, text, the same in a few words)."""


def make_adder(problems: list[Problem], pair: str | None) -> Adder:
    return lambda level, kind, text, short="": problems.append(
        Problem(level, kind, text, pair, short)
    )


# --- the whole set --------------------------------------------------------------------------------


def drop_repeats(checked: Sequence[CheckedPair]) -> tuple[list[CheckedPair], list[Problem]]:
    """Pairs with the same images and caption as one before are used once."""
    kept: dict[tuple, CheckedPair] = {}
    repeats: list[Problem] = []
    for one in checked:
        facts = one.facts
        masks = facts.mask.digest if facts.mask else None
        key = (
            facts.target.digest,
            tuple(reference.digest for reference in facts.references),
            masks,
            one.pair.caption,
        )
        first = kept.setdefault(key, one)
        if first is not one:
            text = message(
                "{pair} repeats {first} and is used once",
                pair=shorten(one.pair.name),
                first=shorten(first.pair.name),
            )
            repeats.append(Problem(Level.WARNING, "repeated", text, one.pair.name, "repeated"))
    return list(kept.values()), repeats


def inspect_set(checked: Sequence[CheckedPair], name: str) -> list[Problem]:
    found: list[Problem] = []
    add = make_adder(found, None)
    if not checked:
        return found
    facts = [one.facts for one in checked]
    same = [
        one
        for one in checked
        if any(reference.digest == one.facts.target.digest for reference in one.facts.references)
    ]
    if len(same) > len(checked) / 2:
        add(
            Level.STOP,
            "same_picture",
            message(
                "in {num_same} of {num_checked} pairs of {name} target and reference are the "
                "same file; expected the edited image as the target",
                num_same=len(same),
                num_checked=len(checked),
                name=shorten(name),
            ),
        )
    found += find_swaps([one.pair for one in checked], facts)
    for group in group_same_targets(checked):
        names = ", ".join(shorten(name, 60) for name in group[:3])
        add(
            Level.WARNING,
            "targets_repeated",
            message(
                "{num_group} pairs have the same target: {names}", num_group=len(group), names=names
            )
            + (", ..." if len(group) > 3 else ""),
        )
    if len(checked) == 1:
        add(Level.WARNING, "one_pair", message("only one pair: a LoRA will memorise it"))
    return found


def group_same_targets(checked: Sequence[CheckedPair]) -> list[list[str]]:
    """Names of pairs whose targets have the same bytes or the same pixels."""
    by_look: dict[tuple, list[CheckedPair]] = defaultdict(list)
    for one in checked:
        target = one.facts.target
        by_look[target.width, target.height, target.signature.tobytes()].append(one)
    groups = []
    for alike in by_look.values():
        first = alike[0]
        same = [
            one.pair.name
            for one in alike[1:]
            if one.facts.target.digest == first.facts.target.digest
            or have_same_pixels(one.pair.target, first.pair.target)
        ]
        if same:
            groups.append([first.pair.name, *same])
    return groups


def count_sizes(checked: Sequence[CheckedPair]) -> Counter[Size]:
    return Counter(one.size for one in checked)
