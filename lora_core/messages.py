"""A text for users that can still be translated: its English, its template and the values in it.

`message("{name} is empty; expected a path", name=name)` is an ordinary str, the English text, so
that everything which takes a text takes it. It also keeps template and values, from which
`translation.translate` makes the same text in another language. A value may be a message itself,
or an error that carries one. Put into an f-string, a message becomes plain English.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any


class Message(str):
    """The English text; equal to, and hashed and written as JSON like, any str of that text."""

    template: str
    values: Mapping[str, Any]

    def __new__(cls, template: str, values: Mapping[str, Any] | None = None) -> Message:
        """`template` is a format string if there are values, and the text itself if not."""
        built = super().__new__(cls, template.format(**values) if values else template)
        built.template = template
        built.values = {name: simplify(value) for name, value in (values or {}).items()}
        return built

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.template, self.values)

    def __deepcopy__(self, memo: Any) -> Message:
        return self  # immutable; `dataclasses.asdict` copies every value


class MessageList(Message):
    """Several texts with a separator between them, such as the lines of a report."""

    separator: str
    parts: tuple[str, ...]

    def __new__(cls, separator: str, parts: Iterable[str]) -> MessageList:
        parts = tuple(parts)
        built = str.__new__(cls, separator.join(parts))
        built.template, built.values = "", {}
        built.separator, built.parts = separator, parts
        return built

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.separator, self.parts)


def message(template: object, /, **values: object) -> str:
    """A text for users. Only literal templates are found, and demanded, by tests/test_messages.py.

    Args:
        template: a format string if there are values, else the text; a finished text or an error
            stays the message it is.
    """
    if values or type(template) is str:
        return Message(str(template), values)
    return get_message(template)


def join_messages(separator: str, parts: Iterable[str]) -> str:
    return MessageList(separator, parts)


def get_message(value: object) -> str:
    """The message that a text is or an error carries; another value's plain text."""
    if isinstance(value, BaseException):
        value = value.args[0] if value.args and isinstance(value.args[0], Message) else str(value)
    return value if isinstance(value, str) else str(value)


def take_clause(text: object) -> str:
    """A message without its full stop, to be continued after a comma."""
    text = get_message(text)
    if type(text) is Message and text.template.endswith("."):
        return Message(text.template[:-1], text.values)
    return text.rstrip(".")


def simplify(value: object) -> Any:
    """As JSON can hold it, and as the same format string prints it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    return get_message(value)


def pack(text: str) -> dict[str, Any] | str:
    """A message as JSON can hold it; other texts stay as they are."""
    if isinstance(text, MessageList):
        return {"separator": text.separator, "parts": [pack(part) for part in text.parts]}
    if isinstance(text, Message):
        packed = {n: pack(v) if isinstance(v, str) else v for n, v in text.values.items()}
        return {"template": text.template, "values": packed}
    return text


def unpack(packed: Any) -> str:
    """The message that `pack` wrote; ValueError, KeyError or TypeError if it did not."""
    if not isinstance(packed, dict):
        return str(packed)
    if "parts" in packed:
        return MessageList(str(packed["separator"]), [unpack(part) for part in packed["parts"]])
    values = {n: unpack(v) if isinstance(v, dict) else v for n, v in packed["values"].items()}
    return Message(str(packed["template"]), values)
