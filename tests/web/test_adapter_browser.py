"""The adapter browser in the real page: hostile files, filters, keyboard, and into the graph."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.adapter_list import AdapterList
from demo_base.adapters import make_adapter
from demo_base.frontend import TOAST
from qwen_edit_lora.lora_core.jobs.made_here import record_deleted
from safetensors.torch import save_file

pytestmark = [pytest.mark.web, pytest.mark.comfy]

JOB_ID = "20260131-120000-0123abcd"  # of a training that was deleted since
HOSTILE = '<img src=x onerror="window.hacked = true">'
MODULES = {f"transformer_blocks.{i}.attn.to_{k}": (32, 32) for i in range(2) for k in "qkv"}

NODES = """() => app.graph._nodes.map((n) => [
    n.comfyClass, n.widgets.find((w) => w.name === "lora_name")?.value ?? null])"""
OFFERED = """() => app.graph.findNodesByType("QwenEditLoraLoad")[0]
    .widgets.find((w) => w.name === "lora_name").options.values"""
#: Whether the single Load node, next to its Apply, has this file.
HOLDS = """name => app.graph._nodes.length === 2 && app.graph
    .findNodesByType("QwenEditLoraLoad")[0].widgets.some(({ value }) => value === name)"""
#: The single Load node, its title bar's screen position, and whether Apply is connected to it.
PAIR = """() => {
    const [load] = app.graph.findNodesByType("QwenEditLoraLoad");
    const [apply] = app.graph.findNodesByType("QwenEditLoraApply");
    const link = apply.inputs.find((input) => input.name === "adapter").link;
    const [x, y] = app.canvasPosToClientPos([load.pos[0] + 20, load.pos[1] - 15]);
    return { x, y, isWired: app.graph.links.get(link).origin_id === load.id,
        name: load.widgets.find((w) => w.name === "lora_name").value };
}"""


@pytest.fixture(scope="module")
def loras(demo_models: Any, base_directory: Path) -> Iterator[Path]:
    """Various files in models/loras, besides those of the demo base."""
    training = base_directory / "user" / "__qwen_edit_lora" / "training"
    training.mkdir(parents=True, exist_ok=True)
    record_deleted(training, JOB_ID)
    folder = demo_models.root / "loras" / "browsed"
    folder.mkdir()
    hostile = {
        "modelspec.title": HOSTILE,
        "modelspec.trigger_phrase": f"{HOSTILE}, restore",
        "modelspec.architecture": "Qwen-Image-Edit-2511/lora",
        HOSTILE: HOSTILE,
    }
    make_adapter(folder / "hostile.safetensors", MODULES, rank=16, metadata=hostile)
    (folder / "hostile.safetensors").rename(folder / "<img src=x onerror=hacked()>.safetensors")
    ours = {"modelspec.architecture": "Qwen-Image-Edit-Plus/lora", "qwen_edit_lora.config": "{}"}
    by_job = {**ours, "qwen_edit_lora.job": JOB_ID}
    make_adapter(folder / "ours.safetensors", MODULES, rank=32, metadata=by_job)
    make_adapter(folder / "loud.safetensors", MODULES, rank=4, delta_std=0.05, metadata=ours)
    (folder / "cut.safetensors").write_bytes(b"\x40" + bytes(40))
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
    save_file({key: torch.zeros(2, 8)}, folder / "sdxl.safetensors")
    yield folder
    shutil.rmtree(folder)


class Browser(AdapterList):
    """A user's actions in the adapter browser."""

    def find(self, text: str) -> Any:
        return self.grid.get_by_role("row").filter(has_text=text)

    def drag(self, text: str, x: float, y: float) -> None:
        box = self.find(text).bounding_box()
        mouse = self.page.mouse
        mouse.move(box["x"] + 60, box["y"] + 20)
        mouse.down()
        mouse.move(x - 40, y - 40, steps=4)
        mouse.move(x, y, steps=4)
        mouse.up()


@pytest.fixture
def opened(workspace: Any, loras: Path) -> Browser:
    workspace.page.evaluate("() => app.graph.clear()")
    workspace.open_panel()
    workspace.page.get_by_role("tab", name="LoRAs").click()
    browser = Browser(workspace.page)
    browser.search("browsed")
    browser.find("ours").wait_for()
    # verdicts arrive by themselves
    browser.find("ours").locator(".qel-health-healthy").wait_for()
    browser.find("loud").locator(".qel-health-warning").wait_for()
    return browser


def test_files_are_found_filtered_and_sorted_and_stay_text(opened, workspace):
    page, element = workspace.page, opened.element
    hostile = "<img src=x onerror=hacked()>"
    assert set(opened.read_names()) == {hostile, "ours", "loud", "cut"}
    element.get_by_label("Sort by", exact=True).select_option("rank")
    assert opened.read_names() == ["ours", hostile, "loud", "cut"]
    element.get_by_label("Sort by", exact=True).select_option("health")
    assert opened.read_names()[:2] == ["cut", "loud"]
    element.get_by_label("Reverse the order").click()
    assert opened.read_names()[-2:] == ["loud", "cut"]

    element.get_by_role("button", name="Filters", exact=True).click()
    element.get_by_label("Base", exact=True).select_option("2511")
    assert opened.read_names() == [hostile]
    element.get_by_label("Base", exact=True).select_option("all")
    element.get_by_label("Trained here", exact=True).check()
    assert opened.read_names() == ["ours"]
    element.get_by_label("Trained here", exact=True).uncheck()
    element.get_by_label("Health", exact=True).select_option("broken")
    assert opened.read_names() == ["cut"]
    element.get_by_role("button", name="Clear filters").click()
    element.get_by_label("Files of other models too").check()
    assert "sdxl" in opened.read_names()
    assert "for SDXL UNet" in opened.find("sdxl").inner_text()
    opened.search("browsed rank 16")
    assert opened.read_names() == [hostile]

    opened.find("<img").click()
    details = page.locator(".qel-details")
    details.locator("summary", has_text="Metadata").click()
    assert details.get_by_role("heading", level=3).inner_text() == hostile
    assert HOSTILE in details.locator(".qel-facts").first.inner_text()  # its title
    assert HOSTILE in details.locator(".qel-metadata").inner_text()
    assert details.locator(".qel-verdict").inner_text().startswith("Healthy")
    assert page.locator(".qel-adapters img").count() == 0
    assert page.evaluate("() => window.hacked") is None
    details.get_by_role("button", name="Copy: restore").click()
    details.get_by_text("Copied").wait_for()
    workspace.shoot("adapters")
    page.keyboard.press("Escape")
    assert details.is_hidden()

    # its settings are empty: reported in a message
    opened.search("ours")
    opened.find("ours").click()
    details.get_by_role("button", name="Train again").click()
    toast = page.locator(TOAST, has_text="Not trained again")
    toast.wait_for()
    assert "the settings in this LoRA are damaged" in toast.inner_text()
    page.keyboard.press("Escape")
    assert details.is_hidden()
    assert workspace.errors == []


@pytest.mark.parametrize("vue", [True, False])
def test_files_get_into_the_graph_by_mouse_and_keyboard_and_out_by_undo(
    opened, workspace, loras, vue
):
    page = workspace.page
    workspace.set_vue_nodes(vue)
    opened.drag("ours", 900, 400)
    page.wait_for_function("() => app.graph._nodes.length === 2")
    pair = page.evaluate(PAIR)
    assert pair["isWired"]
    assert pair["name"] == str(Path("browsed", "ours.safetensors"))
    assert (pair["x"], pair["y"]) == pytest.approx((900, 400), abs=2)
    # onto the Load node there: in place of its file
    opened.drag("loud", 950, 410)
    page.wait_for_function(HOLDS, arg=str(Path("browsed", "loud.safetensors")))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function(HOLDS, arg=str(Path("browsed", "ours.safetensors")))
    # next to it
    opened.drag("loud", 900, 750)
    page.wait_for_function("() => app.graph._nodes.length === 4")
    opened.drag("loud", 200, 500)  # back onto the list: nothing
    workspace.shoot(f"adapters_in_graph_{'vue' if vue else 'classic'}")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function("() => app.graph._nodes.length === 2")

    opened.grid.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    chosen = opened.grid.locator("[aria-selected=true]")
    assert chosen.get_attribute("aria-rowindex") == "2"
    assert opened.grid.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    opened.find("loud").click()
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph._nodes.length === 4")
    assert ["QwenEditLoraLoad", str(Path("browsed", "loud.safetensors"))] in page.evaluate(NODES)

    # a file newer than the page is listed, and known to the loaders before it is chosen there
    make_adapter(loras / "fresh.safetensors", MODULES)
    refresh = opened.element.get_by_role("button", name="Look for new files")
    refresh.click()
    opened.find("fresh").dblclick()
    page.wait_for_function("() => app.graph._nodes.length === 6")
    name = str(Path("browsed", "fresh.safetensors"))
    assert ["QwenEditLoraLoad", name] in page.evaluate(NODES)
    assert name in page.evaluate(OFFERED)
    (loras / "fresh.safetensors").unlink()
    refresh.click()
    opened.find("fresh").wait_for(state="detached")
    assert workspace.errors == []
