"""Requests about a set of image pairs, as the panel sends them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .pair_folders import load_photograph
from .route_server import encode

PAIRS, CACHE = "/qwen_edit_lora/pairs", "/qwen_edit_lora/pair_cache"
TRASH = "/qwen_edit_lora/pair_trash"
IMAGE = {"Content-Type": "application/octet-stream"}


class Page:
    """Requests about one set, as the panel sends them."""

    def __init__(self, routes: Any, name: str):
        self.routes = routes
        listed = routes.ask("GET", PAIRS).read()["sets"]
        self.id = next(one["id"] for one in listed if one["name"] == name)
        self.path = f"{PAIRS}/{self.id}"

    def show(self) -> dict[str, Any]:
        return self.routes.ask("GET", self.path).read()

    def get(self, name: str) -> dict[str, Any]:
        return next(pair for pair in self.show()["pairs"] if pair["name"] == name)

    def post(self, path: str, value: Any = None, **headers: str) -> Any:
        return self.routes.post(f"{self.path}/{path}", value, **headers)

    def upload(self, content: bytes, name: str, slot: Any = 0, pair: str = "", **headers: str):
        query = f"name={encode(name)}&slot={encode(str(slot))}&pair={encode(pair)}"
        return self.routes.ask("POST", f"{self.path}/images?{query}", content, {**IMAGE, **headers})


def make_image(number: int = 5, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    load_photograph(number, 48, 32).save(buffer, kind)
    return buffer.getvalue()


def read_tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
