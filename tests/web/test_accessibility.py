"""axe-core finds nothing to complain about within our elements, in both palettes."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from demo_base.pair_folders import load_photograph, write_pairs, write_picture
from demo_base.pair_panel import get_card, open_pairs, open_set

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
        workspace.open_panel()
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


#: Elements of the panel and of an open dialog that are cut off at a side.
FIND_CUT = """() => [...document.querySelectorAll('.qel-panel *, .qel-dialog[open]')]
    .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
    .filter(e => !['visible', 'clip'].includes(getComputedStyle(e).overflowX))
    .filter(e => !e.matches('textarea, select, .qel-pair-name'))
    .map(e => `${e.className}: ${e.scrollWidth} in ${e.clientWidth} px`)"""


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_axe_finds_nothing_in_image_pairs_down_to_320_pixels(workspace, input_folder, palette):
    page = workspace.page
    write_pairs(input_folder / "looked_at", 3, width=300, height=200)
    write_picture(load_photograph(1), input_folder / "looked_at_source.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "looked_at_source.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    workspace.server.run_prompt(graph)
    setting = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
    page.evaluate(setting, palette)
    found: dict[str, list[str]] = {}

    def look(name: str) -> None:
        found[name] = find_violations(page) + page.evaluate(FIND_CUT)

    try:
        open_pairs(page)
        page.get_by_role("button", name="input/looked_at").wait_for()
        look("list")
        open_set(page, "input/looked_at")
        card = get_card(page, "photo_1")
        card.locator("[data-severity]").first.wait_for()
        card.get_by_role("button", name="Remove this pair").click()
        page.locator(".qel-undo").wait_for()
        page.get_by_role("button", name="Add images").click()
        look("set")
        page.get_by_role("button", name="Undo", exact=True).click()
        card.wait_for()
        for width in (1800, 320):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            for name, button in (
                ("mask", card.get_by_role("button", name="Paint a mask")),
                ("graph", page.get_by_role("button", name="Add from the graph")),
                ("images", card.get_by_role("button", name="View Target")),
            ):
                button.focus()
                page.keyboard.press("Enter")
                dialog = page.locator("dialog[open]")
                dialog.wait_for()
                page.wait_for_timeout(500)
                look(f"{name} at {width} px")
                box = dialog.bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
                workspace.shoot(f"accessibility_pairs_{name}_{width}_{palette}")
                page.keyboard.press("Escape")
                dialog.wait_for(state="detached")
                assert button.evaluate("element => element === document.activeElement"), name
        assert {where: texts for where, texts in found.items() if texts} == {}
    finally:
        page.evaluate(setting, "dark")
        page.wait_for_timeout(300)
    assert workspace.errors == []
