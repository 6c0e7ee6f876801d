"""Names of files that users choose."""

from __future__ import annotations

import re

from ..errors import ConfigError

#: Names of devices on Windows, with whatever ending (Microsoft, "Naming Files, Paths, and
#: Namespaces").
DEVICE_NAMES = ("CON", "PRN", "AUX", "NUL", *(f"{x}{i}" for x in ("COM", "LPT") for i in range(10)))
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
    is_plain = re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f\x7f]+", name) and name[0] != "."
    if not is_plain or name != name.strip() or name.endswith("."):
        raise ConfigError(
            "name is {shown}; expected characters allowed in a file's name, without a dot or "
            'space at either end, e.g. "my edit"',
            shown=shown,
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
