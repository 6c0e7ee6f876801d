"""A text for users that can still be translated: its English, its template and the values in it.

`message("{name} is empty; expected a path", name=name)` is an ordinary str, the English text, so
that everything which takes a text takes it. It also keeps template and values, from which
`translation.translate` makes the same text in another language. A value may be a message itself,
or an error that carries one. Put into an f-string, a message becomes plain English.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

#: In data written to disk, the packed messages among its texts, by their English.
MESSAGES = "messages"
#: Of a packed number; JSON readers refuse larger ones.
MAX_NUMBER = 2**63
#: Of a packed message, in characters: about what a file of messages may hold in all.
MAX_LENGTH = 4 << 20
#: Of a packed format string: what templates here use, and no width that fills memory.
_SPEC = re.compile(r",?(\.\d)?[a-z]?")


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

    def __add__(self, other: str) -> Message:
        return MessageList("", (self, other))

    def __radd__(self, other: str) -> Message:
        return MessageList("", (other, self))

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


def change_values(text: str, change: Callable[[str], str]) -> str:
    """A message with the same template and each text among its values changed; or a changed text.

    `change` gets messages too.
    """
    if isinstance(text, MessageList):
        return MessageList(text.separator, map(change, text.parts))
    if isinstance(text, Message):
        changed = {n: change(v) if isinstance(v, str) else v for n, v in text.values.items()}
        return Message(text.template, changed)
    return change(text)


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
        packed = {name: pack_value(value) for name, value in text.values.items()}
        return {"template": text.template, "values": packed}
    return text


def pack_value(value: Any) -> Any:
    """Numbers that JSON does not have become texts; a message that formats them is then plain."""
    if isinstance(value, str):
        return pack(value)
    is_odd = isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER  # NaN too
    return str(value) if is_odd else value


def unpack(packed: Any) -> str:
    """The message that `pack` wrote; ValueError, KeyError or TypeError if it did not."""
    if not isinstance(packed, dict):
        return str(packed)
    if "parts" in packed:
        separator, parts = str(packed["separator"]), packed["parts"]
        if len(separator) * len(parts) > MAX_LENGTH:
            raise ValueError("a text that no message has")
        return MessageList(separator, [unpack(part) for part in parts])
    template = packed["template"]
    values = {n: unpack(v) if isinstance(v, dict) else v for n, v in packed["values"].items()}
    length = len(template)
    for _, name, spec, _ in string.Formatter().parse(template) if values else ():
        if name is None:
            continue
        if not (name.isidentifier() and _SPEC.fullmatch(spec or "")):
            raise ValueError("a format string that no message has")
        length += len(str(values[name]))
        if length > MAX_LENGTH:  # values that repeat each other double with every level
            raise ValueError("a text that no message has")
    return Message(template, values)


def add_messages(data: dict[str, Any]) -> dict[str, Any]:
    """Data as JSON can hold it, with what its texts need to become messages again.

    The texts themselves stay plain English. `data` may hold dictionaries, lists and tuples.
    """
    packed = {str(text): pack(text) for text in find_messages(data)}
    return {**data, MESSAGES: packed} if packed else data


def find_messages(value: Any) -> Iterator[str]:
    if isinstance(value, Message):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from find_messages(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from find_messages(one)


def restore_messages(value: Any, packed: object) -> Any:
    """Data that `add_messages` wrote, with its messages; a text that does not fit stays plain.

    Args:
        packed: what was found under MESSAGES, if anything.
    """
    if not isinstance(packed, Mapping) or not packed:
        return value

    def restore(text: str) -> str:
        try:
            found = unpack(packed[text]) if text in packed else text
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return text
        return found if found == text else text

    return map_texts(value, restore)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every text changed: in dictionaries, lists, tuples and dataclasses."""
    if isinstance(value, str):
        return change(value) if type(value) in (str, Message, MessageList) else value
    if isinstance(value, Mapping):
        return {name: map_texts(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [map_texts(one, change) for one in value]
    if type(value) is tuple:
        return tuple(map_texts(one, change) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = {name: map_texts(one, change) for name, one in old.items()}
        changed = {name: one for name, one in new.items() if one is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value
