"""Every text of ours can be read in both of ComfyUI's palettes and in both node renderers.

Contrast as WCAG 2.2 defines it (1.4.3): 4.5 to 1. Computed here, since tools that read the page
leave out what a canvas transform has moved.
"""

from __future__ import annotations

from typing import Any

import pytest
from demo_base.pair_folders import write_pairs
from demo_base.pair_panel import get_card, open_pairs, open_set

pytestmark = [pytest.mark.web, pytest.mark.comfy]

MINIMUM = 4.5

#: Of each element with text of its own below the selectors: the text, its color and all backgrounds
#: behind it up to the page, as CSS colors of computed style, and the opacity of all.
READ_TEXTS = """selectors => {
    const toRgba = color => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 1;
        const context = canvas.getContext('2d');
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const found = [];
    for (const root of document.querySelectorAll(selectors)) {
        for (const element of [root, ...root.querySelectorAll('*')]) {
            const isShown = element.checkVisibility(
                { checkOpacity: true, checkVisibilityCSS: true });
            const own = [...element.childNodes].filter(n => n.nodeType === 3)
                .map(n => n.textContent.trim()).join(' ').trim();
            if (!own || !isShown || element.closest('option, [disabled]')) continue;
            const backgrounds = [];
            let opacity = 1;
            for (let e = element; e; e = e.parentElement) {
                const style = getComputedStyle(e);
                backgrounds.push(toRgba(style.backgroundColor));
                opacity *= Number(style.opacity);
            }
            found.push({ text: own.slice(0, 60), where: element.className || element.tagName,
                color: toRgba(getComputedStyle(element).color), backgrounds, opacity });
            for (const part of ['::before']) {
                const style = getComputedStyle(element, part);
                if (!['none', 'normal', '""'].includes(style.content))
                    found.push({ text: style.content, where: element.className || element.tagName,
                        color: toRgba(style.color), backgrounds, opacity });
            }
        }
    }
    return found;
}"""

REPORT = {
    "qwen_edit_lora_report": ["one line\nskipped 2 of 6 keys\nnot readable\na note"],
    "qwen_edit_lora_warning": [True],
    "qwen_edit_lora_findings": [
        {"kind": "a", "severity": "warning", "text": "skipped 2 of 6 keys", "count": 2},
        {"kind": "b", "severity": "error", "text": "not readable", "count": None},
        {"kind": "c", "severity": "note", "text": "a note", "count": None},
    ],
}


def compute_luminance(color: list[float]) -> float:
    parts = [value / 255 for value in color[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lay_over(front: list[float], back: list[float], opacity: float = 1.0) -> list[float]:
    """`front` with its alpha over an opaque `back`."""
    alpha = front[3] * opacity
    return [alpha * f + (1 - alpha) * b for f, b in zip(front[:3], back[:3], strict=True)] + [1.0]


def compute_contrast(shown: dict[str, Any], page_color: list[float]) -> float:
    behind = page_color
    for background in reversed(shown["backgrounds"]):
        behind = lay_over(background, behind)
    front = lay_over(shown["color"], behind, shown["opacity"])
    lighter, darker = sorted((compute_luminance(front), compute_luminance(behind)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_wcag_does():
    white, black, clear = [255, 255, 255, 1], [0, 0, 0, 1], [0, 0, 0, 0]
    shown = {"color": black, "backgrounds": [clear, white], "opacity": 1}
    assert compute_contrast(shown, black) == pytest.approx(21)
    shown = {"color": [0x76, 0x76, 0x76, 1], "backgrounds": [clear], "opacity": 1}
    assert compute_contrast(shown, white) == pytest.approx(4.54, abs=0.01)


PAGE_COLORS = {"dark": [0x20, 0x20, 0x20, 1.0], "light": [0xFF, 0xFF, 0xFF, 1.0]}


def find_unreadable(page: Any, palette: str, selectors: str) -> list[str]:
    shown = page.evaluate(READ_TEXTS, selectors)
    assert shown, f"no text below {selectors}"
    contrasts = [(compute_contrast(one, PAGE_COLORS[palette]), one) for one in shown]
    return sorted({f"{c:.2f} {o['where']}: {o['text']}" for c, o in contrasts if c < MINIMUM})


@pytest.fixture
def palettes(workspace):
    yield ("dark", "light")
    workspace.page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    workspace.page.wait_for_timeout(500)


def test_reports_panel_and_list_can_be_read_in_both_palettes(workspace, palettes):
    page = workspace.page
    page.evaluate(
        """async () => app.loadApiJson({
            1: {class_type: 'QwenEditLoraLoad', inputs: {lora_name: 'my_edit_lora.safetensors'}},
            2: {class_type: 'QwenEditLoraInspect', inputs: {adapter: ['1', 0]}}}, 'contrast')"""
    )
    page.wait_for_timeout(500)
    workspace.open_panel()
    page.get_by_role("tab", name="LoRAs").click()
    page.locator(".qel-adapters .qel-row").first.wait_for()
    unreadable = {}
    for palette in palettes:
        page.evaluate(
            "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette
        )
        for vue in (False, True):
            workspace.set_vue_nodes(vue)
            page.wait_for_timeout(1000)
            page.evaluate(
                """output => app.graph._nodes.filter(n => n.comfyClass === 'QwenEditLoraLoad')
                    .forEach(n => n.showReport(output))""",
                REPORT,
            )
            selectors = ".qwen-edit-lora-report, .qel-panel"
            unreadable[palette, vue] = find_unreadable(page, palette, selectors)
            workspace.shoot(f"contrast_{palette}_{'vue' if vue else 'classic'}")
        page.locator(".qel-adapters .qel-row").first.click()
        page.wait_for_timeout(300)
        unreadable[palette, "details"] = find_unreadable(page, palette, ".qel-panel")
        workspace.shoot(f"contrast_{palette}_details")
        page.get_by_role("tab", name="Trainings").click()
        unreadable[palette, "trainings"] = find_unreadable(page, palette, ".qel-panel")
        page.get_by_role("tab", name="LoRAs").click()
    assert {where: texts for where, texts in unreadable.items() if texts} == {}
    assert workspace.errors == []


def test_image_pairs_can_be_read_in_both_palettes(workspace, input_folder, palettes):
    page = workspace.page
    folder = write_pairs(input_folder / "read", 3, width=300, height=200)
    (folder / "control" / "photo_1.png").unlink()
    unreadable = {}
    open_pairs(page)
    page.get_by_role("button", name="input/read").wait_for()
    for palette in palettes:
        page.evaluate(
            "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette
        )
        page.wait_for_timeout(500)
        open_pairs(page)
        unreadable[palette, "list"] = find_unreadable(page, palette, ".qel-panel")
        open_set(page, "input/read")
        get_card(page, "photo_1").locator("[data-severity='error']").wait_for()
        get_card(page, "photo_0").locator("[data-severity='warning']").wait_for()
        page.get_by_role("button", name="Add images").click()
        unreadable[palette, "set"] = find_unreadable(page, palette, ".qel-panel")
        get_card(page, "photo_0").get_by_role("button", name="Paint a mask").click()
        page.locator("dialog[open]").wait_for()
        unreadable[palette, "mask"] = find_unreadable(page, palette, ".qel-dialog[open]")
        page.keyboard.press("Escape")
    assert {where: texts for where, texts in unreadable.items() if texts} == {}
    assert workspace.errors == []
