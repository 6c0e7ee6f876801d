"""Masks, images from the graph and the clipboard, undo, keys: in a real page of ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture
from demo_base.pair_panel import HOSTILE, draw, drop, get_card, open_pairs, open_set, read_tree
from PIL import Image

pytestmark = [pytest.mark.web, pytest.mark.comfy]

#: Pastes an image as a user does who pressed Ctrl+V: where the focus is.
PASTE = """async () => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [120, 80];
    canvas.getContext('2d').fillRect(10, 10, 60, 40);
    const blob = await new Promise(done => canvas.toBlob(done));
    const data = new DataTransfer();
    data.items.add(new File([blob], 'image.png', {type: 'image/png'}));
    document.activeElement.dispatchEvent(new ClipboardEvent('paste',
        {clipboardData: data, bubbles: true, cancelable: true}));
}"""
COUNT_NODES = "app.graph._nodes.length"


def find_dialog(page: Any) -> Any:
    return page.locator("dialog[open]").last


def press(page: Any, name: str) -> None:
    find_dialog(page).get_by_role("button", name=name, exact=True).click()


def paint(page: Any) -> None:
    """A stroke through the middle, from left to right."""
    box = page.locator(".qel-mask-canvas").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, y, steps=8)
    page.mouse.up()


def test_a_mask_is_painted_over_the_target_with_pointer_and_keys(workspace, input_folder):
    page = workspace.page
    folder = write_pairs(input_folder / "masked", 2, width=300, height=200)
    path = folder / "mask" / "photo_0.png"
    open_set(page, "input/masked")
    card = get_card(page, "photo_0")
    card.get_by_role("button", name="Paint a mask").click()
    page.wait_for_function("document.querySelector('.qel-mask-canvas').width === 300")
    paint(page)
    find_dialog(page).get_by_text("Erase").click()
    page.locator(".qel-mask-canvas").focus()
    page.keyboard.press("Space")  # in the middle, where the pointer was last
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    press(page, "Undo")
    workspace.shoot("pairs_mask")
    press(page, "Save")
    page.locator(".qel-mask-overlay").wait_for()
    mask = np.asarray(Image.open(path))
    assert mask.shape == (200, 300)
    assert (mask[100, 20], mask[100, 150], mask[10, 150]) == (255, 255, 0)
    assert mask[100].min() == 0  # erased at the right end, where the pointer left

    card.get_by_role("button", name="Paint a mask").click()
    page.wait_for_function("document.querySelector('.qel-mask-canvas').width === 300")
    press(page, "Clear")
    page.keyboard.press("Escape")
    press(page, "Back")  # what was painted is not lost by a key
    press(page, "Save")
    page.locator(".qel-mask-overlay").wait_for(state="detached")
    assert not path.exists()
    page.get_by_role("button", name="Undo").click()
    page.locator(".qel-mask-overlay").wait_for()
    assert np.array_equal(np.asarray(Image.open(path)), mask)
    assert workspace.errors == []


def test_images_of_the_graph_and_of_the_clipboard_become_pairs(workspace, input_folder):
    page = workspace.page
    folder = write_pairs(input_folder / "collected", 1)
    write_picture(load_photograph(1, 120, 80), input_folder / "collected_source.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "collected_source.png"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "s/b"}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    workspace.server.run_prompt(graph)
    open_set(page, "input/collected")
    nodes = page.evaluate(COUNT_NODES)
    page.get_by_role("button", name="Add from the graph").click()
    find_dialog(page).locator(".qel-source").nth(1).wait_for()
    find_dialog(page).get_by_label("Name of the new pair").fill("photo_0")
    press(page, "Add")
    find_dialog(page).get_by_text("has an image photo_0 already").wait_for()
    find_dialog(page).get_by_label("Name of the new pair").fill("made")
    press(page, "Add")
    find_dialog(page).get_by_text("Target of made is in the set.").wait_for()
    find_dialog(page).locator(".qel-source").nth(1).click()
    press(page, "Add")
    find_dialog(page).get_by_text("Reference 1 of made is in the set.").wait_for()
    workspace.shoot("pairs_from_the_graph")
    page.keyboard.press("Escape")
    page.locator("dialog[open]").wait_for(state="detached")
    assert {"target/made.png", "control/made.png"} <= read_tree(folder)

    get_card(page, "made").get_by_role("textbox").focus()
    page.evaluate(PASTE)
    press(page, "Add")  # as the next reference of the pair with the focus
    get_card(page, "made").get_by_role("button", name="View Reference 2").wait_for()
    page.get_by_role("heading", name="input/collected").focus()
    page.evaluate(PASTE)
    press(page, "Add")
    get_card(page, "pasted").wait_for()
    assert {"target/pasted.png", "control_2/made.png"} <= read_tree(folder)
    assert page.evaluate(COUNT_NODES) == nodes  # ComfyUI added no node for the image
    assert workspace.errors == []


def test_replaced_images_and_changed_captions_come_back_until_the_trash_is_emptied(
    workspace, input_folder
):
    page = workspace.page
    folder = write_pairs(input_folder / "undone", 2)
    (folder / "target" / "photo_1.txt").unlink()
    before = {name: (folder / name).read_bytes() for name in read_tree(folder)}
    open_set(page, "input/undone")
    drop(page, ".qel-pair-image[data-slot='0']", {"other.png": draw(4, True)})
    page.get_by_text("An image of photo_0 was replaced").wait_for()
    for button, text in (("Trigger word", "ohwx"), ("Caption for all empty", "make it blue")):
        page.get_by_role("button", name=button).click()
        find_dialog(page).get_by_role("textbox").fill(text)
        press(page, "Apply")
        page.get_by_text("1 caption changed").wait_for()
        page.locator("dialog[open]").wait_for(state="detached")
    fields = page.locator(".qel-pair textarea")
    expected = (
        ["ohwx, exchange red and blue, number 0", ""],
        ["exchange red and blue, number 0", ""],
    )
    for texts in expected:
        page.get_by_role("button", name="Undo").click()
        page.wait_for_function(
            "texts => JSON.stringify([...document.querySelectorAll('.qel-pair textarea')]"
            ".map(field => field.value)) === JSON.stringify(texts)",
            arg=texts,
        )
    assert fields.count() == 2
    page.get_by_role("button", name="Undo").click()
    page.locator(".qel-undo").wait_for(state="hidden")
    page.wait_for_timeout(500)
    kept = {name: (folder / name).read_bytes() for name in read_tree(folder)}
    assert {name: kept[name] for name in before} == before
    assert {name for name in kept if not name.startswith(".removed")} == before.keys()

    page.get_by_role("button", name="Back to the sets").click()
    page.get_by_role("button", name="Empty trash").click()
    find_dialog(page).get_by_text("deleted for good").wait_for()
    press(page, "Delete for good")
    page.get_by_text("Removed from sets").wait_for(state="hidden")
    assert read_tree(folder) == before.keys()
    assert workspace.errors == []


def test_keys_in_the_panel_change_no_graph_and_an_open_set_stays_open(workspace, input_folder):
    page = workspace.page
    write_pairs(input_folder / "kept_open", 2)
    page.evaluate(
        "app.canvas.selectItems([app.graph._nodes[0] ?? app.graph.add("
        "LiteGraph.createNode('QwenEditLoraLoad'))])"
    )
    nodes = page.evaluate(COUNT_NODES)
    assert nodes
    open_set(page, "input/kept_open")
    page.get_by_label("Order of the pairs").select_option("backwards")
    get_card(page, "photo_1").get_by_role("button", name="View Target").focus()
    for key in ("Delete", "Backspace", "Control+z", "Control+b"):
        page.keyboard.press(key)
    for tab in ("LoRAs", "Trainings"):
        page.get_by_role("tab", name=tab).click()
        page.keyboard.press("Delete")
    assert page.evaluate(COUNT_NODES) == nodes
    page.get_by_role("tab", name="Image pairs").click()
    page.get_by_role("heading", name="input/kept_open").wait_for()
    names = page.locator(".qel-pair-name")
    names.first.wait_for()
    assert names.all_inner_texts() == ["photo_1", "photo_0"]
    page.get_by_role("tab", name="Image pairs").click()  # once more: the list
    page.get_by_role("button", name="input/kept_open").wait_for()
    assert workspace.errors == []


def test_a_folder_of_before_and_after_becomes_pairs_and_hostile_names_stay_text(
    workspace, input_folder
):
    page = workspace.page
    open_pairs(page)
    hostile = HOSTILE.replace("/", "")
    images = {
        f"{name}_{side}.png": draw(i, side == "after")
        for i, name in enumerate(["cat", "dog"])
        for side in ("before", "after")
    }
    drop(page, ".qel-drop", {**images, "cat.txt": b"<b>make it blue</b>"})
    page.get_by_text("2 pairs · 1 caption").wait_for()
    page.get_by_label("Name of the set").fill("a:b")
    page.get_by_role("button", name="Make the set").click()
    page.get_by_text("which holds ':'").wait_for()
    page.get_by_label("Name of the set").fill("named")
    page.get_by_role("button", name="Make the set").click()
    page.get_by_role("heading", name="input/named").wait_for()
    folder: Path = input_folder / "named"
    expected = {f"{side}/{name}.png" for side in ("target", "control") for name in ("cat", "dog")}
    assert read_tree(folder) == {*expected, "target/cat.txt"}
    assert get_card(page, "cat").get_by_role("textbox").input_value() == "<b>make it blue</b>"

    page.get_by_role("button", name="Back to the sets").click()
    folder.rename(folder.with_name(hostile))
    for side in ("target", "control"):
        (folder.with_name(hostile) / side / "dog.png").rename(
            folder.with_name(hostile) / side / f"{hostile}.png"
        )
    page.get_by_role("button", name="Look for changes").click()
    page.get_by_role("button", name=f"input/{hostile}").click()
    card = get_card(page, hostile)
    card.get_by_role("button", name="Paint a mask").click()
    page.get_by_role("heading", name=f"Mask of {hostile}").wait_for()
    page.keyboard.press("Escape")
    card.get_by_role("button", name="Remove this pair").click()
    page.get_by_text(f"{hostile} was removed").wait_for()
    page.get_by_role("button", name="Add from the graph").click()
    find_dialog(page).get_by_role("button", name="Close").click()
    assert page.evaluate("window.hacked") is None
    assert workspace.errors == []


def test_the_set_that_a_node_has_is_marked_when_another_is_chosen(workspace, input_folder):
    page = workspace.page
    for name in ("first", "second"):
        write_pairs(input_folder / name, 1)
    workspace.open_template("6 Train a LoRA")
    workspace.set_widgets({"folder": "second"}, "QwenEditDataset")
    page.evaluate(
        """app.graph._nodes.find(n => n.comfyClass === 'QwenEditDataset')
            .widgets.find(w => w.name === 'choose_pairs').callback()"""
    )
    marked = find_dialog(page).locator("[aria-current='true']")
    marked.get_by_text("chosen now").wait_for()
    assert "input/second" in marked.inner_text()
    assert "1 pair\n" in f"{marked.inner_text()}\n"
    assert marked.evaluate("element => element === document.activeElement")
    assert workspace.errors == []
