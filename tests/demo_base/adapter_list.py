"""A user's actions in the panel's list of LoRAs, in a page of ComfyUI."""

from __future__ import annotations

from typing import Any


class AdapterList:
    """The list as it is shown."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.element = page.locator(".qel-adapters")
        self.grid = self.element.get_by_role("grid")

    def search(self, text: str) -> None:
        self.element.get_by_role("searchbox").fill(text)
        self.page.wait_for_timeout(300)

    def read_names(self) -> list[str]:
        """Names in display order."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll(".qel-row")]
                .sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)
                .map((row) => row.querySelector(".qel-row-stem").textContent)"""
        )
