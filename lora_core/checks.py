"""Checks of one value in a section of settings; each raises ConfigError."""

from __future__ import annotations

import math

from .errors import ConfigError
from .messages import message
from .text import shorten

#: Of an integer: the largest seed that PyTorch's generators and ComfyUI's fields take.
MAX_WHOLE = 2**64 - 1


def show(value: object) -> str:
    """A value as messages quote it, of whatever kind and size."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        return message("a {name} too large to be shown", name=type(value).__name__)


def is_number(value: object) -> bool:
    """An integer of up to 64 bits, or a float that may be infinite; no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) <= MAX_WHOLE


def check_number(
    section: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    exclusive: bool = False,
    shown: str = "",
) -> None:
    """ConfigError unless low <= value <= high, and finite.

    Args:
        exclusive: leave out `low` itself.
        shown: what the message calls the value; its name if empty.
    """
    value = getattr(section, name)
    if is_number(value) and math.isfinite(value) and low <= value <= high:
        if not (exclusive and value == low):
            return
    expected = "a number"
    if math.isfinite(low):
        expected = (
            message("a number above {low:g}", low=low)
            if exclusive
            else message("{low:g} or more", low=low)
        )
    if math.isfinite(high):
        expected = message("{low:g} to {high:g}", low=low, high=high)
    raise ConfigError(
        "{shown} is {value}; expected {expected}",
        shown=shown or name,
        value=show(value),
        expected=expected,
    )


def check_choice(section: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(section, name)
    if value not in choices:
        raise ConfigError(
            "{name} is {value}; expected one of {choices}",
            name=name,
            value=show(value),
            choices=", ".join(choices),
        )


def check_text(section: object, name: str) -> None:
    value = getattr(section, name)
    if not value.strip():
        raise ConfigError("{name} is empty; expected a path", name=name)
