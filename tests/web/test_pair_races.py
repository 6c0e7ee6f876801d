"""Quick clicks, changes elsewhere and failed requests in image pairs: nothing is lost or wrong."""

from __future__ import annotations

import pytest
from demo_base.frontend import TAB_BUTTON
from demo_base.pair_folders import write_pairs
from demo_base.pair_panel import get_card, open_set

pytestmark = [pytest.mark.web, pytest.mark.comfy]

#: Presses the buttons of two pairs at once, and each of them twice.
REMOVE_TWO = """() => {
    for (const name of ['photo_0', 'photo_1', 'photo_0', 'photo_1'])
        document.querySelector(`.qel-pair[aria-label=${name}] .pi-trash`).parentElement.click();
}"""
LIST = "() => [...document.querySelectorAll('.qel-pair')].map(one => one.ariaLabel)"


def test_pairs_that_are_removed_at_once_are_those_that_leave_the_page(workspace, input_folder):
    page = workspace.page
    folder = write_pairs(input_folder / "quick", 4)
    open_set(page, "input/quick")
    get_card(page, "photo_3").wait_for()
    page.evaluate(REMOVE_TWO)
    get_card(page, "photo_1").wait_for(state="detached")
    page.wait_for_timeout(300)
    assert page.evaluate(LIST) == ["photo_2", "photo_3"]
    assert page.locator(".qel-set-page > .qel-problem").is_hidden()
    left = sorted(path.name for path in (folder / "target").glob("*.png"))
    assert left == ["photo_2.png", "photo_3.png"]
    assert workspace.errors == []


def test_an_undo_that_is_refused_can_be_tried_again(workspace, input_folder):
    page = workspace.page
    folder = write_pairs(input_folder / "again", 2)
    open_set(page, "input/again")
    path = folder / "target" / "photo_1.png"
    before = path.read_bytes()
    get_card(page, "photo_1").get_by_role("button", name="Remove this pair").click()
    page.get_by_text("photo_1 was removed").wait_for()
    path.write_bytes((folder / "target" / "photo_0.png").read_bytes())
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("is there again").wait_for()
    path.unlink()
    page.get_by_role("button", name="Undo").click()
    get_card(page, "photo_1").wait_for()
    page.get_by_text("is there again").wait_for(state="hidden")
    assert path.read_bytes() == before


def test_a_caption_that_cannot_be_saved_as_its_set_is_left_is_there_again(workspace, input_folder):
    page = workspace.page
    folder = write_pairs(input_folder / "left", 1)
    caption = folder / "target" / "photo_0.txt"
    open_set(page, "input/left")
    get_card(page, "photo_0").get_by_role("textbox").fill("mine")
    caption.write_text("theirs")
    page.locator(".qel-back").click()
    page.get_by_text("The caption of photo_0 is not saved").wait_for()
    page.get_by_role("button", name="input/left").click()
    get_card(page, "photo_0").get_by_text("not saved").wait_for()
    assert get_card(page, "photo_0").get_by_role("textbox").input_value() == "mine"
    assert caption.read_text() == "theirs"


def test_no_key_closes_a_mask_that_was_painted(workspace, input_folder):
    page = workspace.page
    write_pairs(input_folder / "painted", 1, width=300, height=200)
    open_set(page, "input/painted")
    get_card(page, "photo_0").get_by_role("button", name="Paint a mask").click()
    page.wait_for_function("document.querySelector('.qel-mask-canvas').width === 300")
    page.keyboard.press("Space")
    for _ in range(3):  # asks, and is answered by the same key
        page.keyboard.press("Escape")
        page.locator(".qel-mask-editor > dialog[open]").wait_for()
        page.keyboard.press("Escape")
        page.locator(".qel-mask-editor > dialog[open]").wait_for(state="detached")
    assert page.locator(".qel-mask-editor[open]").count() == 1


def test_a_server_that_does_not_answer_is_reported_in_the_readers_language(chinese):
    page = chinese.page
    page.route("**/qwen_edit_lora/*", lambda route: route.abort())
    page.locator(TAB_BUTTON).click()
    page.get_by_text("ComfyUI 没有响应").first.wait_for()
    page.get_by_role("tab", name="图像对").click()
    page.get_by_text("ComfyUI 没有响应").first.wait_for()
    assert page.get_by_text("does not answer").count() == 0
