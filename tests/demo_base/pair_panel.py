"""A user's actions in the panel's image pairs, in a page of ComfyUI."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .frontend import TAB_BUTTON
from .pair_folders import edit, load_photograph

HOSTILE = '<img src=x onerror="window.hacked=1">'
DROP = """([selector, files]) => {
    const data = new DataTransfer();
    for (const [name, content] of files) {
        const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
        data.items.add(new File([bytes], name));
    }
    const element = document.querySelector(selector);
    for (const type of ['dragenter', 'dragover', 'drop'])
        element.dispatchEvent(new DragEvent(type, {
            dataTransfer: data, bubbles: true, cancelable: true}));
}"""


def draw(number: int, is_target: bool) -> bytes:
    image = load_photograph(number, 240, 160)
    buffer = io.BytesIO()
    (edit(image) if is_target else image).save(buffer, "PNG")
    return buffer.getvalue()


def drop(page: Any, selector: str, files: Mapping[str, bytes]) -> None:
    listed = [[name, base64.b64encode(content).decode()] for name, content in files.items()]
    page.evaluate(DROP, [selector, listed])


def open_pairs(page: Any) -> Any:
    if not page.locator(".qel-panel").count():
        page.locator(TAB_BUTTON).click()
    page.get_by_role("tab", name="Image pairs").click()
    return page.locator(".qel-panel")


def open_set(page: Any, name: str) -> None:
    open_pairs(page)
    page.get_by_role("button", name=name).click()
    page.get_by_role("heading", name=name).wait_for()


def read_tree(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files}


def get_card(page: Any, name: str) -> Any:
    return page.get_by_role("listitem", name=name, exact=True)
