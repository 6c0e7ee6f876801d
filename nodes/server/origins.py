"""Whose page a request comes from: what a browser says of it, beside where ComfyUI listens."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from ...lora_core.errors import LoraError
from ...lora_core.text import shorten

USUAL_PORTS = (80, 443)


class ForeignPageError(LoraError):
    """A page of another site asks."""


def check_host(given: str | None, addresses: Sequence[str], allowed: str | None) -> None:
    """Raises ForeignPageError for a name that is another site's though it leads here.

    A site can point its own name at 127.0.0.1 once its page is open (DNS rebinding); the browser
    then takes ours for that site's and lets its page read every answer. Where nothing but loopback
    addresses are listened on, a request by any other name is of this kind, or comes through a proxy
    of the user's own, whose name --enable-cors-header can tell. Elsewhere the names that lead here
    are not known, and all of them are taken.

    Args:
        given: the Host header; None is no browser.
        addresses: what the server listens on.
        allowed: the origin that --enable-cors-header names; "*" names none.
    """
    if given is None or not all(map(is_loopback, addresses)):
        return
    name = split_host(given)
    if name is None or not (is_loopback(name) or (allowed and split_name(allowed) == name)):
        raise ForeignPageError(
            f"this request is for the host {shorten(given)!r}, and ComfyUI listens to this machine "
            "only; open it as 127.0.0.1 or localhost, or name the proxy's address in "
            "--enable-cors-header"
        )


def is_loopback(name: str) -> bool:
    """Whether a host's name or address can mean nothing but the machine itself."""
    name = name.strip().lower().strip("[]").removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def split_host(host: str) -> str | None:
    """The name in a Host header, without the port; None where it is none."""
    # What else a URL may hold has no place in a Host header.
    return None if any(c in host for c in "/?#@\\") else split_name(f"http://{host}")


def split_name(origin: str) -> str | None:
    found = split_origin(origin)
    return found and found[0]


def check_origin(headers: Mapping[str, str], own_host: str, allowed: str | None) -> None:
    """Raises ForeignPageError where the browser says that another site's page asks.

    ComfyUI's own check ends where the Host is no loopback address, as with --listen. What is not a
    browser sends neither header.

    Args:
        headers: Sec-Fetch-Site is the browser's own word; it is missing on plain http, where Origin
            is compared with the Host.
        allowed: the origin that --enable-cors-header names; "*" names none.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if origin is not None and origin == allowed:
        return
    if site is not None:
        is_own = site in ("same-origin", "none")
    else:
        is_own = origin is None or split_origin(origin) == split_origin(f"http://{own_host}")
    if not is_own:
        raise ForeignPageError(
            "this request comes from a page of another site; only ComfyUI's own page may change "
            "trainings, or the one that --enable-cors-header names"
        )


def split_origin(origin: str) -> tuple[str, int | None] | None:
    """Host and port, None for a usual one; None for "null" and other texts without a host."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    # A proxy may speak https to the browser and http to us.
    return (parts.hostname, None if port in USUAL_PORTS else port) if parts.hostname else None
