"""axe-core finds nothing to complain about within our elements, in both palettes."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

pytestmark = [pytest.mark.web, pytest.mark.comfy]

OURS = [[".qel-panel"], [".qwen-edit-lora-report"], [".qel-dialog[open]"]]


def find_violations(page: Any) -> list[str]:
    present = [part for part in OURS if page.locator(part[0]).count()]
    assert present
    # Contrast is test_contrast's: axe gives up where a canvas transform moves the text.
    options = {"rules": {"color-contrast": {"enabled": False}}}
    response = Axe().run(page, {"include": present}, options).response
    unclear = [one for one in response["incomplete"] if one["impact"] in ("serious", "critical")]
    return [
        f"{one['id']} ({one['impact']}): {node['html'][:120]}"
        for one in response["violations"] + unclear
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_axe_finds_nothing_in_the_panel_the_list_and_the_reports(workspace, palette):
    page = workspace.page
    setting = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
    page.evaluate(setting, palette)
    try:
        page.evaluate(
            """async () => app.loadApiJson({1: {class_type: 'QwenEditLoraLoad',
                inputs: {lora_name: 'my_edit_lora.safetensors'}}}, 'accessibility')"""
        )
        page.locator(".qwen_edit_lora-tab-button").click()
        found = {"trainings": find_violations(page)}
        page.get_by_role("tab", name="LoRAs").click()
        page.get_by_role("row").first.click()
        page.locator(".qel-details h3").wait_for()
        found["list and details"] = find_violations(page)
        workspace.shoot(f"accessibility_{palette}")
        assert {where: texts for where, texts in found.items() if texts} == {}
    finally:
        page.evaluate(setting, "dark")
        page.wait_for_timeout(300)
