"""How the user started ComfyUI."""

from __future__ import annotations

from comfy.cli_args import args


def get_cors_origin() -> str | None:
    """The value of --enable-cors-header: an origin besides ComfyUI's own page, or "*"."""
    return args.enable_cors_header


def get_listen_addresses() -> list[str]:
    """The addresses given by --listen; "" is every address."""
    return [address.strip() for address in args.listen.split(",")]
