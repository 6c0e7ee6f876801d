"""Which strengths and seeds a user asks for: "0, 0.5, 1, 2", "0:2:0.25", "auto, 5 points".

    list   item, item, ...
    item   number | start:stop:step, the stop included where the steps hit it

Numbers are decimals until the end, so that 0:0.3:0.1 holds 0.3 and not 0.30000000000000004.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from ..disk.safetensors_file import shorten
from ..errors import ConfigError
from ..messages import message
from .cells import MAX_CELLS

#: What Apply Qwen Edit LoRA takes.
MAX_STRENGTH = 100
MAX_SEED = 2**64 - 1
DEFAULT_POINTS = 5

STRENGTHS_EXAMPLE = "'0, 0.5, 1, 2', '0:2:0.25' or 'auto, 5 points'"
SEEDS_EXAMPLE = "'1, 2, 3' or '1:4:1'"

_AUTO = re.compile(r"\s*auto\s*,?\s*(?:(?P<count>\d{1,9})\s*(?:points?)?)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class AutoStrengths:
    """Strengths to be chosen from the adapter's size; see `strength_choice`."""

    count: int = DEFAULT_POINTS
    """How many in all, 0 included."""


def parse_strengths(text: str) -> tuple[float, ...] | AutoStrengths:
    """The strengths without duplicates: 0 first, which is always there, then ascending.

    Raises:
        ConfigError: anything but finite numbers and ranges, or more than MAX_CELLS of them.
    """
    automatic = _AUTO.fullmatch(text)
    if automatic:
        count = int(automatic["count"] or DEFAULT_POINTS)
        if not 2 <= count <= MAX_CELLS:
            raise ConfigError(
                "strengths asks for {count} points; expected 2 to {max_cells}, 0 included, such "
                "as 'auto, 5 points'",
                count=count,
                max_cells=MAX_CELLS,
            )
        return AutoStrengths(count)
    numbers = parse_numbers(text, name="strengths", example=STRENGTHS_EXAMPLE)
    large = [number for number in numbers if abs(number) > MAX_STRENGTH]
    if large:
        raise ConfigError(
            "strengths holds {large}; expected numbers from -{max_strength} to {max_strength}, "
            "such as {strengths_example}",
            large=large[0],
            max_strength=MAX_STRENGTH,
            strengths_example=STRENGTHS_EXAMPLE,
        )
    # + 0.0 turns -0.0 into 0.0.
    others = sorted({float(number) + 0.0 for number in numbers} - {0.0})
    return check_count((0.0, *others), "strengths", STRENGTHS_EXAMPLE)


def parse_seeds(text: str, default: int) -> tuple[int, ...]:
    """The seeds as given, without duplicates; `default` alone if the text is empty.

    Raises:
        ConfigError: anything but whole numbers and ranges of them, or too many.
    """
    if not text.strip():
        return (default,)
    numbers = parse_numbers(text, name="seeds", example=SEEDS_EXAMPLE)
    wrong = [n for n in numbers if n != n.to_integral_value() or not 0 <= n <= MAX_SEED]
    if wrong:
        raise ConfigError(
            "seeds holds {wrong}; expected whole numbers from 0 to {max_seed}, such as "
            "{seeds_example}",
            wrong=wrong[0],
            max_seed=MAX_SEED,
            seeds_example=SEEDS_EXAMPLE,
        )
    seeds = tuple(dict.fromkeys(int(number) for number in numbers))
    return check_count(seeds, "seeds", SEEDS_EXAMPLE)


def parse_numbers(text: str, *, name: str, example: str) -> list[Decimal]:
    """Every number of a list in its order; `name` and `example` are for the messages."""
    found: list[Decimal] = []
    for item in text.strip().split(","):
        parsed = [parse_number(part) for part in item.split(":")]
        bounds = [number for number in parsed if number is not None]
        if len(bounds) < len(parsed) or len(bounds) not in (1, 3):
            problem = (
                message("{name} is empty", name=name)
                if not text.strip()
                else message("{name} is {text!r}", name=name, text=shorten(text))
            )
            raise ConfigError(
                "{problem}; expected finite numbers separated by commas, or start:stop:step, "
                "such as {example}",
                problem=problem,
                example=example,
            )
        found += (
            bounds
            if len(bounds) == 1
            else expand_range(item.strip(), bounds, name=name, example=example)
        )
    return found


def parse_number(text: str) -> Decimal | None:
    """A finite decimal; None for anything else."""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    # Beyond these a float overflows or becomes 0, and a range would never end.
    return number if number.is_finite() and -30 <= number.adjusted() <= 30 else None


def expand_range(item: str, bounds: list[Decimal], *, name: str, example: str) -> list[Decimal]:
    start, stop, step = bounds
    if step == 0 or (stop - start) * step < 0:
        why = (
            message("a step of 0 never arrives")
            if step == 0
            else message("its step leads away from its stop")
        )
        raise ConfigError(
            "{name} holds the range {item!r}, and {why}; expected start:stop:step, such as "
            "{example}",
            name=name,
            item=shorten(item),
            why=why,
            example=example,
        )
    count = int((stop - start) / step) + 1
    if count > MAX_CELLS:
        raise ConfigError(describe_excess(count, name, example))
    return [start + index * step for index in range(count)]


def check_count(values: tuple, name: str, example: str) -> tuple:
    if len(values) > MAX_CELLS:
        raise ConfigError(describe_excess(len(values), name, example))
    return values


def describe_excess(count: int, name: str, example: str) -> str:
    return message(
        "{name} asks for {count} values; a sweep has at most {max_cells} images, so "
        "expected fewer, such as {example}",
        name=name,
        count=count,
        max_cells=MAX_CELLS,
        example=example,
    )
