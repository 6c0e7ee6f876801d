"""Image pairs in the panel, as a user makes a set: in the real page of a real ComfyUI."""

from __future__ import annotations

import pytest
from demo_base.pair_folders import write_pairs
from demo_base.pair_panel import HOSTILE, draw, drop, get_card, open_pairs, open_set, read_tree

pytestmark = [pytest.mark.web, pytest.mark.comfy]


def test_dropped_images_become_a_captioned_set_that_is_trained(workspace, input_folder):
    page = workspace.page
    open_pairs(page)
    names = ["cat", "dog", "owl"]
    for slot in (0, 1):
        files = {f"{name}.png": draw(i, slot == 0) for i, name in enumerate(names)}
        drop(page, f".qel-side[data-slot='{slot}']", files)
    page.get_by_text("3 pairs", exact=True).wait_for()
    page.get_by_label("Name of the set").fill("animals")
    page.get_by_role("button", name="Make the set").click()
    page.get_by_role("heading", name="input/animals").wait_for()
    folder = input_folder / "animals"
    sides = {f"{side}/{name}.png" for side in ("target", "control") for name in names}
    assert read_tree(folder) == sides

    captions = {"cat": "make it blue", "dog": HOSTILE, "owl": "second\nline"}
    for name, text in captions.items():
        get_card(page, name).get_by_role("textbox").fill(text)
    page.get_by_role("heading", name="input/animals").click()  # leaves the last one
    get_card(page, "owl").get_by_text("saved", exact=True).wait_for()
    for name, text in captions.items():
        assert (folder / "target" / f"{name}.txt").read_text() == text

    page.reload()
    page.wait_for_function("window.app?.graph && window.app?.extensionManager")
    page.wait_for_timeout(1000)
    page.keyboard.press("Escape")
    open_set(page, "input/animals")
    for name, text in captions.items():
        assert get_card(page, name).get_by_role("textbox").input_value() == text
    assert page.evaluate("window.hacked") is None
    page.wait_for_function("[...document.querySelectorAll('.qel-pair img')].length >= 6")
    page.wait_for_function(
        "[...document.querySelectorAll('.qel-pair img')].every(i => i.complete && i.naturalWidth)"
    )
    workspace.shoot("pairs_set")

    get_card(page, "dog").get_by_role("button", name="Remove this pair").click()
    page.get_by_text("dog was removed").wait_for()
    assert get_card(page, "dog").count() == 0
    assert not (folder / "target" / "dog.png").exists()
    page.get_by_role("button", name="Undo").click()
    get_card(page, "dog").wait_for()
    assert get_card(page, "dog").get_by_role("textbox").input_value() == HOSTILE
    assert read_tree(folder) == sides | {f"target/{name}.txt" for name in names}

    page.get_by_role("button", name="Train this").click()
    page.wait_for_function(
        """() => app.graph._nodes.find(n => n.comfyClass === 'QwenEditDataset')
            ?.widgets.find(w => w.name === 'folder').value === 'input/animals'"""
    )
    types = page.evaluate("app.graph._nodes.map(n => n.comfyClass)")
    assert "QwenEditLoraTrain" in types
    assert workspace.errors == []


CHOOSE = "app.graph._nodes.find(n => n.comfyClass === 'QwenEditDataset')"


def test_a_set_is_chosen_on_the_node_and_any_text_stays_as_it_was_saved(workspace, input_folder):
    write_pairs(input_folder / HOSTILE.replace("/", ""), 1)
    write_pairs(input_folder / "chosen", 2, caption=None)
    page = workspace.page
    workspace.open_template("6 Train a LoRA")
    workspace.set_widgets({"folder": "any/text of mine"}, "QwenEditDataset")
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("text => app.loadGraphData(JSON.parse(text))", saved)
    values = page.evaluate(f"{CHOOSE}.serialize().widgets_values")
    assert values == ["any/text of mine", "2509 / 2511", 1, "", False, "stop", "", 1]
    page.evaluate(f"{CHOOSE}.widgets.find(w => w.name === 'choose_pairs').callback()")
    dialog = page.get_by_role("dialog", name="Choose a set of image pairs")
    dialog.get_by_text("2 pairs · 2 without a caption").wait_for()
    dialog.get_by_role("button", name="input/chosen 2 pairs").click()
    dialog.wait_for(state="detached")
    assert page.evaluate(f"{CHOOSE}.serialize().widgets_values")[0] == "input/chosen"
    page.evaluate(f"{CHOOSE}.widgets.find(w => w.name === 'choose_pairs').callback()")
    dialog.get_by_role("button", name="Edit input/chosen").click()
    page.get_by_role("heading", name="input/chosen").wait_for()
    assert get_card(page, "photo_1").count() == 1
    assert page.evaluate("window.hacked") is None
    assert workspace.errors == []


def test_no_caption_and_no_removed_pair_is_lost(workspace, input_folder):
    """Closed while typing, changed elsewhere, two pairs removed in a row."""
    page = workspace.page
    folder = write_pairs(input_folder / "kept", 3)
    open_set(page, "input/kept")
    caption = folder / "target" / "photo_0.txt"
    get_card(page, "photo_0").get_by_role("textbox").fill("typed, not left")
    page.reload()  # as a closed tab
    page.wait_for_function("window.app?.graph && window.app?.extensionManager")
    page.wait_for_timeout(1000)
    assert caption.read_text() == "typed, not left"

    page.keyboard.press("Escape")
    open_set(page, "input/kept")
    field = get_card(page, "photo_0").get_by_role("textbox")
    field.fill("mine")
    caption.write_text("theirs")
    page.get_by_role("heading", name="input/kept").click()
    get_card(page, "photo_0").get_by_text("changed elsewhere, to “theirs”").wait_for()
    assert (field.input_value(), caption.read_text()) == ("mine", "theirs")
    field.focus()
    page.get_by_role("heading", name="input/kept").click()
    get_card(page, "photo_0").get_by_text("saved", exact=True).wait_for()
    assert caption.read_text() == "mine"

    for name in ("photo_1", "photo_2"):
        get_card(page, name).get_by_role("button", name="Remove this pair").click()
        page.get_by_text(f"{name} was removed").wait_for()
    for name in ("photo_2", "photo_1"):
        page.get_by_role("button", name="Undo").click()
        get_card(page, name).wait_for()
    assert {path.name for path in (folder / "target").glob("*.png")} == {
        f"photo_{i}.png" for i in range(3)
    }
    assert workspace.errors == []
