"""PEFT's patterns of module names, matched without a regular expression.

PEFT takes each as one: re.match(rf"(.*\\.)?({pattern})$", name), see get_pattern_key in
peft/utils/other.py. Here the text comes from an untrusted file, and a regular expression can be
written so that it never ends. What PEFT and people really write are module names, sometimes with
".*" or "\\d+"; for those the answer is PEFT's, in time linear in the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

MAX_LENGTH = 200
#: Tokens of all the patterns that are more than a name: each is tried on every module.
MAX_WILDCARD_TOKENS = 4000

_ANY, _ANY_RUN, _DIGITS = object(), object(), object()
#: Longest first.
_TOKENS = (("\\d+", _DIGITS), (".*", _ANY_RUN), ("\\.", "."), (".", _ANY))


def parse_pattern(pattern: str) -> tuple[bool, tuple[object, ...]] | None:
    """(whether it starts at the name's beginning, its tokens); None if it is of no known form."""
    if not 0 < len(pattern) <= MAX_LENGTH:
        return None
    is_anchored = pattern.startswith("^")
    rest = pattern.removeprefix("^").removesuffix("$")
    tokens: list[object] = []
    while rest:
        text, token = next(
            ((text, token) for text, token in _TOKENS if rest.startswith(text)), (rest[0], rest[0])
        )
        if text == token and not (text.isalnum() or text in "_-"):
            return None
        tokens.append(token)
        rest = rest[len(text) :]
    return (is_anchored, tuple(tokens)) if tokens else None


class PatternTable:
    """Patterns in their order; a name belongs to the first one that matches it."""

    def __init__(self, patterns: Iterable[str]):
        self.unsupported: list[str] = []
        """Those of no known form, which match nothing here."""
        self._plain: dict[int, dict[tuple[int, ...], dict[str, tuple[int, str]]]] = {}
        self._wildcards: list[tuple[int, str, bool, tuple[object, ...]]] = []
        num_tokens = 0
        for index, pattern in enumerate(patterns):
            parsed = parse_pattern(pattern)
            if parsed is None:
                self.unsupported.append(pattern)
            elif not parsed[0] and not {_ANY_RUN, _DIGITS}.intersection(parsed[1]):
                self._add_plain(index, pattern, parsed[1])
            elif num_tokens + len(parsed[1]) <= MAX_WILDCARD_TOKENS:
                num_tokens += len(parsed[1])
                self._wildcards.append((index, pattern, *parsed))
            else:
                self.unsupported.append(pattern)

    def _add_plain(self, index: int, pattern: str, tokens: tuple[object, ...]) -> None:
        """By length and wildcard positions: one lookup finds one of thousands."""
        holes = tuple(i for i, token in enumerate(tokens) if token is _ANY)
        text = "".join("." if token is _ANY else str(token) for token in tokens)
        layouts = self._plain.setdefault(len(text), {})
        layouts.setdefault(holes, {}).setdefault(text, (index, pattern))

    def find(self, name: str) -> str | None:
        """The first pattern that matches `name` or the end of it behind a dot."""
        starts = [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
        found: list[tuple[int, str]] = []
        for start in starts:
            end = name[start:]
            for holes, texts in self._plain.get(len(end), {}).items():
                hit = texts.get(mask_positions(end, holes))
                if hit is not None:
                    found.append(hit)
        masks = build_masks(name) if self._wildcards else {}
        for index, pattern, is_anchored, tokens in self._wildcards:
            if matches(tokens, masks, len(name), [0] if is_anchored else starts):
                found.append((index, pattern))
        return min(found)[1] if found else None


def mask_positions(text: str, holes: tuple[int, ...]) -> str:
    if not holes:
        return text
    chars = list(text)
    for hole in holes:
        chars[hole] = "."
    return "".join(chars)


def build_masks(name: str) -> Mapping[object, int]:
    """Character, or _DIGITS -> the positions where it occurs, as bits."""
    masks: dict[object, int] = {_DIGITS: 0}
    for i, char in enumerate(name):
        masks[char] = masks.get(char, 0) | 1 << i
        if char.isdecimal():
            masks[_DIGITS] |= 1 << i
    return masks


def matches(
    tokens: Iterable[object], masks: Mapping[object, int], length: int, starts: Iterable[int]
) -> bool:
    """Whether the tokens spell the name from one of `starts` to its end.

    All paths are followed at once: bit i of `places` says that what was matched so far may end
    before character i, so no text can cause backtracking.
    """
    whole = (1 << length + 1) - 1
    places = sum(1 << start for start in set(starts))
    for token in tokens:
        if token is _ANY_RUN:
            places = whole & -(places & -places)  # from the first place on
        elif token is _ANY:
            places = places << 1 & whole
        elif token is _DIGITS:
            step = grown = (places & masks[_DIGITS]) << 1
            while step := (step & masks[_DIGITS]) << 1 & ~grown:
                grown |= step
            places = grown
        else:
            places = (places & masks.get(token, 0)) << 1
        if not places:
            return False
    return bool(places >> length & 1)


class ModulePatterns:
    """Pattern -> value, as in PEFT's alpha_pattern and rank_pattern."""

    def __init__(self, values: Mapping[str, float]):
        self.values = dict(values)

    @cached_property
    def _table(self) -> PatternTable:
        return PatternTable(self.values)

    @property
    def unsupported(self) -> list[str]:
        return self._table.unsupported

    def find(self, name: str) -> float | None:
        """The value of the first pattern that matches."""
        pattern = self._table.find(name) if self.values else None
        return None if pattern is None else self.values[pattern]
