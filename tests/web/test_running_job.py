"""A training that runs, seen from its page: orders, title, notification; and what is downloaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from qwen_edit_lora.lora_core.jobs.job import JobState, JobStatus

for name in ("test_panel", "test_accessibility", "test_contrast"):  # not on the path
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

from test_accessibility import find_violations  # noqa: E402
from test_contrast import find_unreadable  # noqa: E402
from test_panel import (  # noqa: E402
    HOSTILE,
    MANY,
    QUICK,
    host,  # noqa: F401 - a fixture
    make_rows,
    open_panel,
    press,
    press_and_answer,
    reach_panel,
    server,  # noqa: F401 - a fixture
    wait_for,
)
from tiny_jobs import make_train  # noqa: E402

pytestmark = [pytest.mark.web, pytest.mark.comfy]

SEND = "detail => app.api.dispatchCustomEvent('qwen_edit_lora.job', detail)"
#: Records the browser's notifications, which headless Chromium shows nowhere.
RECORD = """() => {
    window.sent = [];
    const Real = window.Notification;
    window.Notification = class extends Real {
        constructor(title, options) {
            super(title, options);
            window.sent.push([title, options.body]);
        }
    };
}"""
PALETTE = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"


def test_a_running_training_takes_orders_and_shows_itself_in_the_title(workspace, host):  # noqa: F811
    page = workspace.page
    base = page.title()
    samples = {"every": MANY, "steps": 2}
    job_id = host.store.submit(make_train(host.material, steps=MANY), samples=samples)
    open_panel(page)
    row = page.locator("button.qel-job", has_text="tiny")
    row.click()
    page.locator("[data-action=save]").wait_for()
    wait_for(lambda: host.store.get(job_id).state.step > 0, page)
    press(page, "save")
    wait_for(lambda: page.locator(".qel-files li", has_text="tiny_0").count() > 0, page)
    press(page, "sample")
    wait_for(lambda: len(host.store.list_samples(job_id)) > 1, page)
    wait_for(lambda: page.locator("[data-action=sample]").inner_text() == "Sample next step", page)
    assert host.store.get(job_id).status is JobStatus.IN_PROGRESS
    workspace.shoot("running_job")

    wait_for(lambda: re.match(r"\d+% tiny · ", page.title()), page)
    assert page.title().endswith(base)
    own = "[40%]Unsaved Workflow - ComfyUI"  # ComfyUI's, while a prompt runs
    page.evaluate("title => { document.title = title }", own)
    step = host.store.get(job_id).state.step
    wait_for(lambda: host.store.get(job_id).state.step > step + 20, page)
    page.wait_for_timeout(1500)
    assert page.title() == own
    page.evaluate("title => { document.title = title }", base)
    wait_for(lambda: re.match(r"\d+% tiny · ", page.title()), page)
    press_and_answer(page, "cancel", "Stop and save")
    wait_for(lambda: page.title() == base, page)
    assert page.locator("[data-action=save]").is_hidden()
    host.store.delete(job_id)
    assert workspace.errors == []


def test_an_ordered_step_says_so_and_keeps_the_focus(workspace, host):  # noqa: F811
    page, now = workspace.page, time.time()
    running = JobState(
        **{"status": JobStatus.IN_PROGRESS, "created_at": now, "queued_at": now},
        **{"step": 40, "num_steps": 100},
    )
    job_id = host.add_job(running, make_rows(40), name="watched")
    folder = host.store.catalog.find(job_id)
    assert folder.lock.try_acquire()  # as a worker holds it
    try:
        open_panel(page)
        page.locator("button.qel-job", has_text="watched").click()
        button = page.locator("[data-action=save]")
        button.focus()
        page.keyboard.press("Enter")
        wait_for(lambda: button.inner_text() == "After this step …", page)
        assert button.get_attribute("aria-disabled") == "true"
        assert page.evaluate("document.activeElement.dataset.action") == "save"
        assert (folder.path / "save.order").is_file()
    finally:
        folder.clear_orders()
        folder.write_state(dataclasses.replace(running, status=JobStatus.PAUSED))
        folder.lock.release()
    wait_for(lambda: button.is_hidden(), page)
    host.store.delete(job_id)
    assert workspace.errors == []


def test_a_notification_comes_only_after_the_user_switched_it_on(workspace, host):  # noqa: F811
    page = workspace.page
    page.context.grant_permissions(["notifications"], origin=host.server.url)
    page.evaluate(RECORD)
    open_panel(page)
    job = {"id": "20260131-120000-0123abcd", "name": HOSTILE, "created_at": 1, "actions": []}
    job |= {"step": 1, "num_steps": 2, "ended_at": time.time()}

    def end(status: str, **more: Any) -> None:
        page.evaluate(SEND, {**job, "status": "in_progress"})
        page.evaluate(SEND, {**job, "status": status, **more})

    wait_for(lambda: page.locator(".qel-view").count(), page)
    page.wait_for_timeout(1000)
    end("completed")
    assert page.evaluate("window.sent") == []
    switch = page.get_by_role("switch", name="Desktop notification at the end")
    assert not switch.is_checked()
    switch.check()
    wait_for(lambda: switch.is_checked(), page)
    end("completed", published=["a.safetensors"])
    end("failed", failure={"sentence": "no room", "advice": []})
    end("cancelled")  # by the user, who knows
    assert page.evaluate("window.sent") == [
        [f"{HOSTILE} is trained", "a.safetensors"],
        [f"{HOSTILE} failed", "no room"],
    ]
    page.reload()
    reach_panel(page)
    assert switch.is_checked()
    switch.uncheck()
    page.reload()
    reach_panel(page)
    page.evaluate(RECORD)
    assert not switch.is_checked()
    end("completed")
    assert page.evaluate("window.sent") == []
    assert page.evaluate("window.hacked") is None
    assert workspace.errors == []


def test_a_refused_permission_is_said_and_not_asked_for_again(workspace, host):  # noqa: F811
    page = workspace.page
    page.evaluate(
        """() => {
            window.asked = 0;
            const ask = Notification.requestPermission.bind(Notification);
            Notification.requestPermission = () => { window.asked++; return ask(); };
        }"""
    )
    open_panel(page)
    assert page.evaluate("window.asked") == 0
    switch = page.get_by_role("switch", name="Desktop notification at the end")
    switch.click()
    page.get_by_text("This browser forbids notifications").wait_for()
    assert not switch.is_checked()
    asked = page.evaluate("window.asked")
    assert asked <= 1  # headless Chromium has refused already
    switch.click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.asked") == asked
    assert page.evaluate("localStorage.getItem('qwen_edit_lora.notify')") == "off"


def test_what_is_measured_before_a_training_is_a_row_of_the_list(workspace, host):  # noqa: F811
    page = workspace.page
    workspace.open_template("6 Train a LoRA")
    workspace.set_widgets({**QUICK, "estimate": "measure first", "name": "measured"})
    open_panel(page)
    page.get_by_test_id("queue-button").click()
    row = page.locator(".qel-measured")
    row.wait_for()
    assert "A few steps on three blocks" in row.inner_text()
    assert "No training yet" not in page.locator(".qel-panel").inner_text()
    workspace.shoot("measuring")
    row.wait_for(state="detached")
    for job in host.store.list():
        host.store.cancel(job.id)
        wait_for(lambda job=job: host.store.get(job.id).status.is_finished, page)
        host.store.delete(job.id)


@pytest.fixture
def finished(host):  # noqa: F811
    now = time.time()
    state = JobState(
        **{"status": JobStatus.COMPLETED, "created_at": now, "queued_at": now, "ended_at": now},
        **{"step": 100, "num_steps": 100},
    )
    job_id = host.add_job(state, make_rows(100), log="first line\n", name="kept")
    folder = host.store.catalog.find(job_id)
    (folder.path / "kept.safetensors").write_bytes(b"weights")
    folder.samples.mkdir()
    colors = {"source": "#a33", "target": "#3a3", 0: "#225", 50: "#338", 100: "#44b"}
    for item in ("item_0", "item_1"):
        for key, color in colors.items():
            if (item, key) == ("item_1", 50):
                continue
            names = {"source": f"source_{item}_0", "target": f"target_{item}"}
            stem = names.get(key) or f"step_{key:08d}_{item}"
            Image.new("RGB", (64, 64), color).save(folder.samples / f"{stem}.png")
    yield folder
    host.store.delete(job_id)


def test_images_log_and_lora_files_can_be_downloaded(workspace, finished, host):  # noqa: F811
    page = workspace.page
    open_panel(page)
    page.locator("button.qel-job", has_text="kept").click()
    page.locator(".qel-tile img").first.wait_for()
    page.locator("summary", has_text="Log").click()
    found = {}
    for label in ("All as ZIP", "Download the log", "Download kept.safetensors"):
        with page.expect_download() as caught:
            page.get_by_role("link", name=label).click()
        path = caught.value.path()
        found[caught.value.suggested_filename] = Path(path).read_bytes()
    assert found.keys() == {"kept samples.zip", "kept log.txt", "kept.safetensors"}
    assert len(zipfile.ZipFile(io.BytesIO(found["kept samples.zip"])).namelist()) == 9
    assert found["kept log.txt"] == b"first line\n"
    assert found["kept.safetensors"] == b"weights"
    assert workspace.errors == []


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_page_of_a_training_is_accessible_and_readable(workspace, finished, palette):
    page = workspace.page
    page.evaluate(PALETTE, palette)
    try:
        open_panel(page)
        page.evaluate(SEND, {"measuring": [{"id": "a", "name": "measured one"}]})
        page.wait_for_timeout(800)
        workspace.shoot(f"job_list_{palette}")
        assert find_violations(page) == []
        assert find_unreadable(page, palette, ".qel-panel") == []
        page.locator("button.qel-job", has_text="kept").click()
        page.locator(".qel-tile img").first.wait_for()
        page.locator("summary", has_text="Log").click()
        page.wait_for_timeout(800)
        workspace.shoot(f"job_page_{palette}")
        assert find_violations(page) == []
        assert find_unreadable(page, palette, ".qel-panel") == []
    finally:
        page.evaluate(PALETTE, "dark")
        page.wait_for_timeout(300)
