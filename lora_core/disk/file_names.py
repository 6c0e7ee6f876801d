"""Names of files that users choose."""

from __future__ import annotations

import re

from ..errors import ConfigError

#: Names of devices on Windows, with whatever ending (Microsoft, "Naming Files, Paths, and
#: Namespaces").
DEVICE_NAMES = ("CON", "PRN", "AUX", "NUL", *(f"{x}{i}" for x in ("COM", "LPT") for i in range(10)))
#: Characters that Windows allows in no file's name, and separators of folders.
_FORBIDDEN = re.compile(r"[\\/:*?\"<>|\x00-\x1f\x7f]")
SHOWN_FORBIDDEN = '\\ / : * ? " < > |'
#: Bytes of a file's name on all common file systems (NAME_MAX).
MAX_NAME_BYTES = 255


def check_file_name(name: str, longest_ending: str) -> None:
    """Whether every file made of a name can be written on Linux, macOS and Windows.

    Args:
        longest_ending: the longest text that is appended to the name.

    Raises:
        ConfigError: it cannot.
    """
    start = name if len(name) <= 40 else f"{name[:40]}…"
    shown = repr(start.encode(errors="backslashreplace").decode())
    if not name.strip():
        raise ConfigError("name is {shown}; expected at least one letter or digit", shown=shown)
    wrong = _FORBIDDEN.search(name)
    if wrong:
        raise ConfigError(
            "name is {shown}, which holds {wrong!r}; expected no control character and none of "
            "{forbidden}",
            shown=shown,
            wrong=wrong[0],
            forbidden=SHOWN_FORBIDDEN,
        )
    if name[0] == "." or name[0].isspace():
        raise ConfigError(
            "name is {shown}, which begins with {wrong!r}; expected neither a dot nor a space at "
            "either end",
            shown=shown,
            wrong=name[0],
        )
    if name[-1] == "." or name[-1].isspace():
        raise ConfigError(
            "name is {shown}, which ends with {wrong!r}; expected neither a dot nor a space at "
            "either end",
            shown=shown,
            wrong=name[-1],
        )
    if name.partition(".")[0].strip().upper() in DEVICE_NAMES:
        raise ConfigError(
            "name is {shown}, which Windows reserves for a device; choose another one", shown=shown
        )
    try:
        size = len(f"{name}{longest_ending}".encode())
    except UnicodeEncodeError:
        raise ConfigError(
            "name is {shown}, which holds an incomplete character; type it again", shown=shown
        ) from None
    if size > MAX_NAME_BYTES:
        raise ConfigError(
            "name is {shown}, {size} bytes; expected at most {limit}, since file "
            "systems limit bytes and the files' names are longer",
            shown=shown,
            size=len(name.encode()),
            limit=MAX_NAME_BYTES - len(longest_ending),
        )
