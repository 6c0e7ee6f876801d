"""Checks a request's origin: the browser's headers against the addresses ComfyUI listens on."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from ...lora_core.errors import LoraError
from ...lora_core.text import shorten

USUAL_PORTS = (80, 443)


class ForeignPageError(LoraError):
    """The request comes from a page of another site."""


def check_host(given: str | None, addresses: Sequence[str], allowed: str | None) -> None:
    """Raises ForeignPageError for a host name of another site that resolves to this machine.

    A site can point its own name at 127.0.0.1 once its page is open (DNS rebinding); the browser
    then treats this server as that site and lets its page read every response. If only loopback
    addresses are listened on, a request by any other name is such an attack, or comes through the
    user's own proxy, whose name --enable-cors-header can give. Otherwise the names that resolve
    here are unknown, and all of them are accepted.

    Args:
        given: the Host header; None if the client is not a browser.
        addresses: the addresses the server listens on.
        allowed: the origin given by --enable-cors-header; "*" gives none.
    """
    if given is None or not all(map(is_loopback, addresses)):
        return
    name = split_host(given)
    if name is None or not (is_loopback(name) or (allowed and split_name(allowed) == name)):
        raise ForeignPageError(
            "this request is for the host {given!r}, and ComfyUI listens to this machine only; "
            "open it as 127.0.0.1 or localhost, or name the proxy's address in "
            "--enable-cors-header",
            given=shorten(given),
        )


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean the machine itself."""
    name = name.strip().lower().strip("[]").removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def split_host(host: str) -> str | None:
    """The name in a Host header, without the port; None if it is invalid."""
    # The other parts of a URL are not allowed in a Host header.
    return None if any(c in host for c in "/?#@\\") else split_name(f"http://{host}")


def split_name(origin: str) -> str | None:
    found = split_origin(origin)
    return found and found[0]


def check_origin(headers: Mapping[str, str], own_host: str, allowed: str | None) -> None:
    """Raises ForeignPageError if the browser says that the request comes from another site's page.

    ComfyUI's own check does not apply unless the Host is a loopback address, e.g. with --listen.
    Clients other than browsers send neither header.

    Args:
        headers: Sec-Fetch-Site is set by the browser itself; it is missing on plain http, where
            Origin is compared with the Host.
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
    """Host and port, None for a default port; None for "null" and other texts without a host."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    # A proxy may speak https to the browser and http to us.
    return (parts.hostname, None if port in USUAL_PORTS else port) if parts.hostname else None
