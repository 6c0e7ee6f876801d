"""From an empty page to an edited image beside its source, as someone does who knows nothing yet.

No file manager, and nothing typed but a name and an instruction. Only what makes the tiny base
quick (steps, sizes) is set behind the scenes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.frontend import TAB_BUTTON
from demo_base.pair_panel import draw, drop

pytestmark = [pytest.mark.web, pytest.mark.comfy]

NUM_PAIRS = 6
SET_NAME = "stranger"
INSTRUCTION = "make it blue"
TRAINING = {
    **{"megapixels": 0.02, "reference_megapixels": 0.02, "batch_size": 2, "sample_every": 5},
    **{"name": "strangers_lora", "steps": 10},
}
TRAINING_TIMEOUT_MS = 240_000
SHOW_COMPARISON = """() => {
    const node = app.graph._nodes.find(n => n.type === 'ImageCompare');
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [500 - node.pos[0], 200 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture
def input_folder(base_directory: Path) -> Iterator[Path]:
    folder = base_directory / "input"
    yield folder
    shutil.rmtree(folder / SET_NAME, ignore_errors=True)


def make_set(page: Any) -> None:
    page.locator(TAB_BUTTON).click()
    page.get_by_role("tab", name="Image pairs").click()
    for slot in (0, 1):  # 0 is the target
        files = {f"photo_{i}.png": draw(i, slot == 0) for i in range(NUM_PAIRS)}
        drop(page, f".qel-side[data-slot='{slot}']", files)
    page.get_by_text(f"{NUM_PAIRS} pairs", exact=True).wait_for()
    page.get_by_label("Name of the set").fill(SET_NAME)
    page.get_by_role("button", name="Make the set").click()
    page.get_by_role("heading", name=f"input/{SET_NAME}").wait_for()
    page.get_by_role("button", name="Caption for all empty").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill(INSTRUCTION)
    dialog.get_by_role("button", name="Apply").click()
    page.get_by_text(f"{NUM_PAIRS} captions changed").wait_for()


def train(workspace: Any) -> None:
    """Until the panel says that it is done."""
    page = workspace.page
    page.get_by_role("button", name="Train this").click()
    page.wait_for_function(
        f"""() => app.graph._nodes.find(n => n.comfyClass === 'QwenEditDataset')
            ?.widgets.find(w => w.name === 'folder').value === 'input/{SET_NAME}'"""
    )
    workspace.set_widgets(TRAINING)
    assert workspace.run()["status"]["status_str"] == "success"
    page.get_by_role("tab", name="Trainings").click()
    page.get_by_role("button", name="strangers_lora").first.click()
    page.get_by_role("heading", name="strangers_lora").wait_for()
    status = page.locator(".qel-page .qel-status").first
    page.wait_for_function(
        "e => e.textContent === 'completed'",
        arg=status.element_handle(),
        timeout=TRAINING_TIMEOUT_MS,
    )
    page.get_by_role("img", name="step 10").first.wait_for()


def edit_an_image(workspace: Any) -> None:
    """The LoRA takes the place of the file that the template names and the stranger lacks."""
    page = workspace.page
    workspace.open_template("1 Apply a LoRA")
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'ImageCompare')")
    page.locator(".qel-panel").get_by_role("button", name="Load into graph").first.click()
    page.get_by_text("It takes the place of the missing file; press Run.").wait_for()
    loaders = page.evaluate(
        """() => app.graph._nodes.filter(n => n.comfyClass === 'QwenEditLoraLoad')
            .map(n => n.widgets.find(w => w.name === 'lora_name').value)"""
    )
    assert loaders == ["strangers_lora.safetensors"]
    workspace.set_widgets({"steps": 1, "cfg": 1})
    assert workspace.run()["status"]["status_str"] == "success"


def test_a_stranger_gets_from_an_empty_page_to_a_compared_image(workspace, input_folder):
    page = workspace.page
    workspace.set_vue_nodes(True)  # only there has Compare Images its slider
    page.evaluate("app.graph.clear()")
    workspace.open_template("6 Train a LoRA")
    make_set(page)
    workspace.shoot("stranger_set")
    train(workspace)
    workspace.shoot("stranger_trained")
    edit_an_image(workspace)
    page.evaluate(SHOW_COMPARISON)
    viewport = page.get_by_test_id("image-compare-viewport")
    viewport.wait_for()
    images = viewport.get_by_role("img")
    assert images.count() == 2
    for image in images.all():
        page.wait_for_function("i => i.naturalWidth > 500", arg=image.element_handle())
    assert len({image.get_attribute("src") for image in images.all()}) == 2
    reports = workspace.read_reports()
    assert "strangers_lora.safetensors: matched 20 modules" in reports["QwenEditLoraLoad"]
    assert "side path: 20 modules" in reports["QwenEditLoraApply"]
    workspace.shoot("stranger_compared")
    assert workspace.errors == []
