"""The page's viewer of sample images, with images of one color each: no training needed."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.web, pytest.mark.comfy]

MOUNT = """async () => {
    const base = '/extensions/qwen-edit-lora';
    const { SampleStrip } = await import(`${base}/panel/sample_strip.js`);
    const { createTranslator } = await import(`${base}/translation.js`);
    window.draw = color => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 64;
        const context = canvas.getContext('2d');
        context.fillStyle = color;
        context.fillRect(0, 0, 64, 64);
        return canvas.toDataURL();
    };
    const colors = { source: 'red', target: 'lime', sample: 'blue' };
    window.asked = [];
    const getUrl = name => {
        window.asked.push(name);
        return window.failing === name ? '/nowhere.png' : window.draw(colors[name.split('_')[1]]);
    };
    const t = createTranslator(app);
    const strip = new SampleStrip({ t, getUrl, archiveUrl: "#" });
    const panel = document.createElement('div');
    panel.className = 'qel-panel';
    panel.id = 'mounted';
    panel.style.cssText = 'position: fixed; inset: 60px 40% 40% 60px; z-index: 9; overflow: auto';
    panel.append(strip.element);
    document.body.append(panel);
    const image = (item, kind, step) =>
        ({ item, kind, step, index: 0, name: `${item}_${kind}_${step ?? ''}` });
    const row = item => [image(item, 'sample', 20), image(item, 'target'),
        image(item, 'source'), image(item, 'sample', 10)];
    window.strip = strip;
    strip.update({ pictures: [...row('a'), ...row('b')], settings: { 'samples.every': 10 } });
}"""
READ = """() => {
    const dialog = document.querySelector('#mounted dialog');
    return {
        caption: dialog.querySelector('figcaption').textContent,
        other: dialog.querySelector('.qel-compared').hidden
            ? null : dialog.querySelector('.qel-compared').alt,
        at: dialog.querySelector('.qel-compare').style.getPropertyValue('--qel-at'),
    };
}"""


@pytest.fixture
def strip(workspace):
    workspace.page.evaluate("window.failing = null")
    workspace.page.evaluate(MOUNT)
    return workspace.page.locator("#mounted")


def test_a_sample_is_compared_with_its_target_and_arrows_move_both_ways(workspace, strip):
    page = workspace.page
    tiles = strip.locator(".qel-sample-row").first.locator(".qel-tile")
    assert tiles.all_inner_texts() == ["source", "target", "step 10", "step 20"]
    tiles.nth(2).click()
    assert page.evaluate(READ) == {"caption": "a · step 10", "other": None, "at": ""}
    strip.get_by_label("Compare with").select_option(label="target")
    slider = strip.get_by_role("slider")
    slider.focus()
    slider.press("Home")
    assert page.evaluate(READ) == {"caption": "a · step 10", "other": "target", "at": "0%"}
    slider.press("End")
    assert page.evaluate(READ)["at"] == "100%"

    strip.get_by_role("button", name="Next").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(READ) == {"caption": "a · step 20", "other": "target", "at": "100%"}
    page.keyboard.press("ArrowDown")
    assert page.evaluate(READ)["caption"] == "b · step 20"
    page.keyboard.press("ArrowDown")  # the last row
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(READ) == {"caption": "b · step 10", "other": "target", "at": "100%"}
    labels = strip.get_by_label("Compare with").locator("option").all_inner_texts()
    assert labels == ["nothing", "source", "target"]  # step 10 is the first
    saved = strip.get_by_role("link", name="Save image")
    assert saved.get_attribute("download") == "b_sample_10"
    workspace.shoot("sample_viewer")
    assert workspace.errors == []


GAPS = """() => {
    const image = (item, kind, step) =>
        ({ item, kind, step, index: 0, name: `${item}_${kind}_${step ?? ''}` });
    window.strip.update({
        pictures: [image('a', 'source'), ...[0, 10, 20].map(step => image('a', 'sample', step)),
            image('b', 'source'), image('b', 'target'), image('b', 'sample', 20)],
        captions: { a: `make it <b>blue</b> ${'x '.repeat(150)}` }, settings: {} });
}"""
FOCUSED = "() => document.activeElement.dataset.name"


def test_steps_are_columns_and_arrow_keys_reach_every_image_both_ways(workspace, strip):
    page = workspace.page
    page.evaluate(GAPS)
    rows = strip.get_by_role("row")
    assert [len(row.get_by_role("gridcell").all()) for row in rows.all()] == [5, 5]
    captions = strip.get_by_role("rowheader").all_inner_texts()
    assert captions[0].startswith("make it <b>blue</b>")
    assert captions[1] == "b"
    left = [
        strip.locator(f"[data-name={name}]").bounding_box()["x"]
        for name in ("a_sample_20", "b_sample_20", "b_target_")
    ]
    assert left[0] == left[1] > left[2]

    strip.get_by_role("link", name="All as ZIP").focus()
    page.keyboard.press("Tab")
    reached = [page.evaluate(FOCUSED)]
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
        reached.append(page.evaluate(FOCUSED))
    assert reached == [
        *("a_source_", "a_sample_0", "a_sample_10"),  # a has no target
        *("b_target_", "b_sample_20", "a_sample_20", "a_sample_20"),  # b has no step 10
    ]
    assert strip.locator("[tabindex='0'][data-name]").count() == 1
    page.keyboard.press("Enter")
    caption = page.evaluate(READ)["caption"]
    assert caption.startswith("make it <b>blue</b>")
    assert caption.endswith("· step 20")
    dialog = strip.locator("dialog").bounding_box()
    assert dialog["width"] < 700  # the caption does not make it wider
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(READ)["caption"].endswith("· step 10")
    assert workspace.errors == []


def test_the_compared_image_covers_the_left_of_the_slider(workspace, strip):
    page = workspace.page
    strip.locator(".qel-tile", has_text="step 10").first.click()
    strip.get_by_label("Compare with").select_option(label="target")
    page.wait_for_timeout(300)
    box = strip.locator(".qel-compare").bounding_box()
    assert box is not None
    shot = page.screenshot(clip={**box})
    colors = page.evaluate(
        """async bytes => {
            const image = await createImageBitmap(new Blob([new Uint8Array(bytes)]));
            const canvas = new OffscreenCanvas(image.width, image.height);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            return [0.25, 0.75].map(x => [...context.getImageData(
                x * image.width, image.height / 2, 1, 1).data].slice(0, 3));
        }""",
        list(shot),
    )
    assert colors == [[0, 255, 0], [0, 0, 255]]


def test_an_image_that_fails_is_asked_for_once_more_and_hidden_if_it_fails_again(workspace, strip):
    page = workspace.page
    page.evaluate("window.failing = 'a_sample_10'")
    strip.locator(".qel-tile", has_text="step 10").first.click()
    large = strip.locator(".qel-compare > .qel-large").first
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_function(
        "document.querySelector('#mounted .qel-large').style.visibility === 'hidden'"
    )
    page.wait_for_timeout(3000)
    assert len([url for url in requests if url.endswith("/nowhere.png")]) == 1
    assert large.evaluate("image => image.style.visibility") == "hidden"
    page.evaluate("window.failing = null")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#mounted .qel-large').style.visibility === ''")


def test_an_image_with_a_substitute_is_replaced_by_it_once_it_has_failed_twice(workspace):
    page = workspace.page
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.evaluate(
        """async () => {
            const { buildImage } = await import('/extensions/qwen-edit-lora/elements.js');
            const onfail = image => image.replaceWith('cannot be shown');
            const place = document.createElement('div');
            place.id = 'failing';
            place.append(buildImage({ src: '/no_such_image.png', onfail }));
            document.body.append(place);
        }"""
    )
    page.wait_for_function("document.getElementById('failing').textContent === 'cannot be shown'")
    assert len([url for url in requests if url.endswith("/no_such_image.png")]) == 2
