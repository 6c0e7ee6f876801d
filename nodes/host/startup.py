"""How the user started ComfyUI."""

from __future__ import annotations

from comfy.cli_args import args


def get_cors_origin() -> str | None:
    """What --enable-cors-header names: an origin beside ComfyUI's own page, or "*"."""
    return args.enable_cors_header


def get_listen_addresses() -> list[str]:
    """What --listen names; "" is every address."""
    return [address.strip() for address in args.listen.split(",")]
