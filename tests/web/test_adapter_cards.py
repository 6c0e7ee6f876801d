"""Previews, stars, cards and notes in the LoRA list, in the real page."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.adapter_list import AdapterList
from demo_base.adapters import make_adapter
from demo_base.frontend import TAB_BUTTON
from PIL import Image

for name in ("test_accessibility", "test_contrast"):  # not on the path
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

from test_accessibility import find_violations  # noqa: E402
from test_contrast import find_unreadable  # noqa: E402

pytestmark = [pytest.mark.web, pytest.mark.comfy]

HOSTILE = '<img src=x onerror="window.hacked = true">'
MODULES = {f"transformer_blocks.{i}.attn.to_{k}": (32, 32) for i in range(2) for k in "qkv"}
PALETTE = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
#: Natural widths of the images that are shown, by name.
LOADED = """() => Object.fromEntries([...document.querySelectorAll(".qel-row")].map((row) => [
    row.querySelector(".qel-row-stem").textContent,
    row.querySelector(".qel-thumb img")?.naturalWidth ?? null]))"""


@pytest.fixture(scope="module")
def loras(demo_models: Any) -> Iterator[Path]:
    folder = demo_models.root / "loras" / "cards"
    folder.mkdir()
    for name, color in (("seen", "#2d7d46"), ("noted", None), ("fake", None)):
        make_adapter(folder / f"{name}.safetensors", MODULES, rank=16)
        if color:
            Image.new("RGB", (640, 480), color).save(folder / f"{name}.preview.png")
    (folder / "fake.png").write_bytes(b"<script>window.hacked = true</script>")
    civitai = {"id": 2, "modelId": 1, "trainedWords": ["old photo"], "baseModel": HOSTILE}
    values = {"model_name": HOSTILE, "notes": f"note {HOSTILE}", "civitai": civitai}
    (folder / "noted.metadata.json").write_text(json.dumps(values))
    (folder / "noted.json").write_text("{")
    yield folder
    shutil.rmtree(folder)


class List(AdapterList):
    """A user's actions in the list."""

    def find(self, stem: str) -> Any:
        name = self.page.locator(".qel-row-stem", has_text=stem)
        return self.grid.locator(".qel-row").filter(has=name)

    def open(self) -> None:
        if not self.page.locator(".qel-panel").count():
            self.page.locator(TAB_BUTTON).click()
        self.page.get_by_role("tab", name="LoRAs").click()
        self.search("cards")
        self.find("seen").wait_for()


@pytest.fixture
def opened(workspace: Any, loras: Path) -> List:
    workspace.page.evaluate("() => localStorage.removeItem('qwen_edit_lora.adapters_view')")
    workspace.uncover()
    shown = List(workspace.page)
    shown.open()
    return shown


def test_previews_and_notes_are_shown_and_stay_text(opened, workspace):
    page = workspace.page
    page.wait_for_function(f"() => ({LOADED})().seen === 320")
    assert page.evaluate(LOADED)["noted"] is None
    image = opened.find("fake").locator("img")
    page.wait_for_timeout(3000)  # a broken one is asked for once more, then hidden
    assert image.evaluate("image => image.style.visibility") == "hidden"
    opened.find("noted").click()
    details = page.locator(".qel-details")
    details.get_by_text("Noted beside the file").wait_for()
    text = details.inner_text()
    assert f"note {HOSTILE}" in text
    assert "From noted.metadata.json" in text
    assert "noted.json cannot be read as JSON" in text
    link = details.get_by_role("link")
    assert link.get_attribute("href") == "https://civitai.com/models/1?modelVersionId=2"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert details.get_by_role("button", name="Copy: old photo").count() == 1
    assert details.locator("img").count() == 0
    assert page.evaluate("() => window.hacked") is None
    opened.find("seen").click()
    details.locator("img.qel-preview").wait_for()
    workspace.shoot("adapter_cards_list")
    assert workspace.errors == []


def test_a_star_filters_sorts_and_survives_a_reload(opened, workspace):
    page = workspace.page
    assert opened.find("noted").get_by_role("button", name="Make it a favourite").count() == 1
    opened.find("noted").click()
    opened.grid.focus()
    page.keyboard.press("f")
    opened.find("noted").get_by_role("button", name="No longer a favourite").wait_for()
    workspace.reload()
    opened.open()
    star = opened.find("noted").locator(".qel-star")
    assert star.get_attribute("aria-pressed") == "true"
    opened.element.get_by_label("Sort by", exact=True).select_option("favourite")
    assert opened.read_names()[0] == "noted"
    opened.element.get_by_role("button", name="Filters", exact=True).click()
    opened.element.get_by_label("Favourites", exact=True).check()
    assert opened.read_names() == ["noted"]
    star.click()  # takes it again: it leaves the list
    page.wait_for_function("() => document.querySelectorAll('.qel-row').length === 0")
    opened.element.get_by_role("button", name="Clear filters").first.click()
    assert len(opened.read_names()) == 3
    assert workspace.errors == []


def test_cards_follow_the_arrow_keys_and_are_remembered(opened, workspace):
    page = workspace.page
    switch = opened.element.get_by_role("button", name="Show as cards")
    switch.click()
    boxes = [row.bounding_box() for row in opened.grid.locator(".qel-row").all()]
    assert len({box["x"] for box in boxes}) == 2
    assert len({box["y"] for box in boxes}) == 2
    opened.grid.focus()
    page.keyboard.press("Home")
    places = []
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        chosen = opened.grid.locator("[aria-selected=true]")
        places.append(chosen.get_attribute("aria-rowindex"))
    assert places == ["2", "1", "3", "1"]
    page.locator(".qel-details h3").wait_for()
    workspace.shoot("adapter_cards_grid")
    workspace.reload()
    opened.open()
    assert switch.get_attribute("aria-pressed") == "true"
    switch.click()
    assert len({row.bounding_box()["x"] for row in opened.grid.locator(".qel-row").all()}) == 1
    assert workspace.errors == []


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_cards_are_accessible_and_readable_in_both_palettes(opened, workspace, palette):
    page = workspace.page
    page.evaluate(PALETTE, palette)
    try:
        page.wait_for_timeout(800)
        for view in ("list", "cards"):
            if view == "cards":
                opened.element.get_by_role("button", name="Show as cards").click()
            opened.find("noted").click()
            page.get_by_text("Noted beside the file").wait_for()
            workspace.shoot(f"adapter_{view}_{palette}")
            assert find_violations(page) == []
            assert find_unreadable(page, palette, ".qel-panel") == []
    finally:
        page.evaluate(PALETTE, "dark")
        page.wait_for_timeout(300)


def test_a_thousand_loras_with_images_load_only_those_in_view(opened, workspace):
    page = workspace.page
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if "/preview?" in r.url else None)
    page.evaluate(
        """async () => {
            const answer = await (await app.api.fetchApi('/qwen_edit_lora/adapters')).json();
            const seen = answer.adapters.find((entry) => entry.name.includes('seen'));
            const adapters = Array.from({ length: 1000 }, (_, i) => ({ ...seen,
                id: i.toString(16).padStart(16, '0'), name: `cards/many ${i}.safetensors` }));
            app.api.dispatchCustomEvent('qwen_edit_lora.adapters',
                { adapters, gone: [], pending: 0 });
        }"""
    )
    opened.search("many")
    page.wait_for_timeout(1000)
    assert 0 < len(asked) < 80
    opened.element.get_by_role("button", name="Show as cards").click()
    page.wait_for_timeout(500)
    assert page.locator(".qel-row").count() < 60
    opened.grid.evaluate("list => { list.scrollTop = list.scrollHeight }")
    page.wait_for_timeout(500)
    assert page.locator(".qel-row").count() < 60
    assert len(asked) < 160
