"""What is reported beyond the result itself: a sentence for people, a kind for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .messages import message

#: Worth knowing, asks for nothing.
NOTE = "note"
#: The result may not be what was meant.
WARNING = "warning"
#: There is no use in the result.
ERROR = "error"
#: The worst first.
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Finding:
    """One thing found. Programs decide by `kind` and `severity`; `text` is for people only.

    A kind never changes its name; texts may.
    """

    kind: str
    severity: str
    """One of SEVERITIES."""
    text: str
    count: int | None = None
    """How many keys, modules or files it is about."""


def mark_warnings(texts: Iterable[str]) -> list[str]:
    """As lines of a report."""
    return [message("Warning: {text}", text=text) for text in texts]


def list_texts(findings: Iterable[Finding], severity: str) -> tuple[str, ...]:
    return tuple(finding.text for finding in findings if finding.severity == severity)
