"""ComfyUI's real page in a real browser."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from demo_base.frontend import TAB_BUTTON
from playwright.sync_api import TimeoutError

SET_WIDGETS = """([values, type]) => {
    for (const node of app.graph._nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in values && (!type || node.comfyClass === type))
                widget.value = values[widget.name];
}"""
READY = "window.app?.graph && window.app?.extensionManager"
#: Once the workflow that the page starts with is loaded, nothing more replaces the graph.
HAS_GRAPH = "app.graph._nodes.length > 0"
HAS_GRAPH_MS = 1500  # for a frontend that starts with an empty one
GET_VUE_NODES = "app.extensionManager.setting.get('Comfy.VueNodes.Enabled')"
TIMEOUT_MS = 120_000
RUN_TIMEOUT = 300.0  # seconds; the sweeps make a dozen model calls with a 1-megapixel reference


class Workspace:
    """One open page: a user's actions, and errors in our files meanwhile."""

    def __init__(self, page: Any, server: Any, shots: Path) -> None:
        self.page = page
        self.server = server
        self.shots = shots
        self.errors: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note_console(self, message: Any) -> None:
        # The frontend logs its own errors (404 for empty user folders); ours contain our folder.
        where = message.location.get("url", "") + message.text
        if message.type == "error" and "/extensions/qwen-edit-lora/" in where:
            self.errors.append(message.text)

    def open(self) -> None:
        self.page.goto(self.server.url)
        self.page.wait_for_function(READY)
        with suppress(TimeoutError):
            self.page.wait_for_function(HAS_GRAPH, timeout=HAS_GRAPH_MS)
        self.page.locator(TAB_BUTTON).wait_for()
        self.page.keyboard.press("Escape")

    def set_vue_nodes(self, enabled: bool) -> None:
        if self.page.evaluate(GET_VUE_NODES) == enabled:
            return
        self.page.evaluate(
            "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", enabled
        )
        self.page.wait_for_timeout(500)

    def open_template(self, name: str) -> None:
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_test_id("template-workflows-content").wait_for()
        self.page.get_by_text("qwen-edit-lora", exact=True).first.click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function(
            "() => app.graph._nodes.some(n => n.comfyClass?.startsWith('QwenEditLora'))"
        )

    def open_panel(self) -> None:
        self.page.locator(TAB_BUTTON).click()

    def set_widgets(self, values: dict[str, Any], node_type: str | None = None) -> None:
        """Widgets of these names, on every node or on those of one type."""
        self.page.evaluate(SET_WIDGETS, [values, node_type])

    def run(self) -> dict[str, Any]:
        """Presses Run; the history entry of that prompt once it has ended."""
        before = set(self.server.get("/history"))
        self.page.get_by_test_id("queue-button").click()
        deadline = time.monotonic() + RUN_TIMEOUT
        while not set(history := self.server.get("/history")) - before:
            assert time.monotonic() < deadline, "the prompt did not end in time"
            self.page.wait_for_timeout(200)  # keeps the page's own events going
        (prompt_id,) = set(history) - before
        return history[prompt_id]

    def read_reports(self) -> dict[str, str]:
        """Node type -> report as shown on the node, with its figures unfolded."""
        return self.page.evaluate(
            """() => Object.fromEntries(app.graph._nodes
                .filter(n => n.showReport)
                .map(n => {
                    const { element } = n.widgets.find(w => w.name === 'report_view');
                    element.querySelectorAll('details').forEach(d => { d.open = true; });
                    return [n.comfyClass,
                        element.querySelector('.qwen-edit-lora-report').innerText];
                }))"""
        )

    def wait_for_reports(self) -> dict[str, str]:
        """The reports, once the page has processed the events of a finished run."""
        self.page.wait_for_timeout(1000)
        return self.read_reports()

    def read_in_both_renderers(self, name: str) -> Iterator[dict[str, str]]:
        """The reports in the classic renderer, then in Vue nodes; with a screenshot of each."""
        yield self.wait_for_reports()
        self.shoot(f"{name}_classic")
        self.set_vue_nodes(True)
        yield self.wait_for_reports()
        self.shoot(f"{name}_vue")

    def shoot(self, name: str) -> Path:
        path = self.shots / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@pytest.fixture
def workspace(browser: Any, server: Any, tmp_path: Path) -> Iterator[Workspace]:
    shots = Path(os.environ.get("QWEN_EDIT_LORA_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1800, "height": 1000})
    workspace = Workspace(context.new_page(), server, shots)
    workspace.open()
    workspace.set_vue_nodes(False)  # a server setting that an earlier test may have left
    yield workspace
    context.close()


@pytest.fixture
def chinese(workspace: Any) -> Iterator[Any]:
    """The page in Chinese; the server stores the setting, so it is restored."""
    set_setting = "([id, value]) => app.extensionManager.setting.set(id, value)"
    workspace.page.evaluate(set_setting, ["Comfy.Locale", "zh"])
    try:
        workspace.page.reload()
        workspace.page.wait_for_function(READY)
        yield workspace
    finally:
        workspace.set_vue_nodes(False)
        workspace.page.evaluate(set_setting, ["Comfy.Locale", "en"])
