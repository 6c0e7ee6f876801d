"""Other people's text inside our sentences: shortened, and without control characters."""

from __future__ import annotations

#: Of a name, a key or a value that a sentence repeats.
MAX_SHOWN = 80
_TAIL = 16


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters, the end kept; what cannot be printed becomes "?"."""
    if len(text) > limit:
        text = f"{text[: limit - _TAIL - 4]}...{text[-_TAIL:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
