"""Whether values from a file have the types of a dataclass's fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

#: An integer is accepted as a float; true and false as nothing else.
ALLOWED: Mapping[Any, frozenset[type]] = {
    float: frozenset((float, int)),
    int: frozenset((int,)),
    str: frozenset((str,)),
    bool: frozenset((bool,)),
}

Check = Callable[[Any], bool]


def check_fields(instance: Any) -> None:
    """
    Raises:
        TypeError: a field of this dataclass holds a value of another type.
    """
    plain, others = split_fields(instance.__class__)
    values = vars(instance)
    for name, allowed in plain:
        if type(values[name]) not in allowed:
            raise TypeError(f"{name} is of another type")
    for name, check in others:
        value = values[name]
        if value != () and not check(value):
            raise TypeError(f"{name} is of another type")


@lru_cache
def split_fields(
    kind: type,
) -> tuple[list[tuple[str, frozenset[type]]], list[tuple[str, Check]]]:
    """Fields of one number or text, and those that need more than a look at their type."""
    hints = typing.get_type_hints(kind)
    plain = [(name, ALLOWED[hint]) for name, hint in hints.items() if hint in ALLOWED]
    others = [(name, build_check(hint)) for name, hint in hints.items() if hint not in ALLOWED]
    return plain, others


@lru_cache
def build_check(hint: Any) -> Check:
    """Of plain types, unions, tuples, mappings and classes; anything fits Any."""
    if hint is Any:
        return lambda value: True
    if hint in ALLOWED:
        allowed = ALLOWED[hint]
        return lambda value: type(value) in allowed
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        checks = [build_check(one) for one in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is tuple and arguments[-1] is ...:
        check_all = build_check_of_all(arguments[0])
        return lambda value: type(value) is tuple and check_all(value)
    if origin is tuple:
        checks = [build_check(one) for one in arguments]
        return lambda value: (
            type(value) is tuple
            and len(value) == len(checks)
            and all(check(one) for check, one in zip(checks, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        keys, values = map(build_check_of_all, arguments)
        return lambda value: isinstance(value, dict) and keys(value) and values(value.values())
    kind = origin or hint
    return lambda value: isinstance(value, kind)


def build_check_of_all(hint: Any) -> Check:
    """Numbers and texts, of which there are many, are checked by type directly."""
    if hint is Any:
        return lambda values: True
    if hint in ALLOWED:
        allowed = ALLOWED[hint]
        return lambda values: set(map(type, values)) <= allowed
    check = build_check(hint)
    return lambda values: all(map(check, values))
