"""The panel, used as by someone who trains overnight: in the real page of a real ComfyUI."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.frontend import BADGE, TAB_BUTTON, TOAST, write_user_settings
from demo_base.server import ComfyServer
from qwen_edit_lora.lora_core.jobs.failure import explain_error
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import JobFailure, JobState, JobStatus
from qwen_edit_lora.lora_core.jobs.store import JobStore

CORE_TESTS = Path(__file__).resolve().parents[1] / "lora_core"
for name, path in (
    ("tiny", CORE_TESTS / "training" / "tiny.py"),
    ("tiny_jobs", CORE_TESTS / "jobs" / "tiny_jobs.py"),
):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

from tiny_jobs import kill_workers, make_material, make_train  # noqa: E402

pytestmark = [pytest.mark.web, pytest.mark.comfy]

MANY = 20_000  # steps; a job this long ends only because it is stopped
HOSTILE = '<img src=x onerror="window.hacked=1">'
#: Changes to the workflow, so that its first step comes soon.
QUICK = {
    **{"megapixels": 0.02, "reference_megapixels": 0.02, "sample_every": 0},
    **{"estimate": "skip", "steps": MANY, "name": "from the button", "while_training": "share"},
}


class Host:
    """Our own ComfyUI, which can be restarted, and its store of jobs."""

    def __init__(self, base: Path, comfyui: Path, folder: Path):
        self.base, self.comfyui, self.user = base, comfyui, folder / "user"
        write_user_settings(self.user)
        self.material = make_material(folder)
        self.root = self.user / "__qwen_edit_lora" / "training"
        self.store = JobStore(self.root)
        self.port: int | None = None
        self.start()

    def start(self) -> None:
        extra = ("--user-directory", str(self.user))
        self.server = ComfyServer.start(
            self.base, sys.executable, self.comfyui, self.port, extra_args=extra
        )
        self.server.wait_ready()
        self.port = self.server.port

    def restart(self) -> None:
        self.server.process.kill()
        self.server.process.wait()
        self.start()

    def add_job(self, state: JobState, lines: list[dict[str, Any]] = (), log: str = "", **changes):
        """Adds a job as left by a worker; returns its id."""
        job_id = self.store.submit(make_train(self.material, **changes))
        folder = self.store.catalog.find(job_id)
        assert folder.lock.try_acquire()
        try:
            folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            folder.log.write_text(log)
            folder.write_state(state, durable=False)
        finally:
            folder.lock.release()
        return job_id


@pytest.fixture(scope="module")
def host(base_directory, demo_models, comfyui_path, tmp_path_factory) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # tiny products spread over busy cores take minutes
        host = Host(base_directory, comfyui_path, tmp_path_factory.mktemp("panel"))
        yield host
    host.server.stop()
    kill_workers(host.root)
    host.store.index.close()


@pytest.fixture
def server(host: Host) -> ComfyServer:
    """The one that `workspace` opens."""
    return host.server


def open_panel(page: Any) -> Any:
    if not page.locator(".qel-panel").count():
        page.locator(TAB_BUTTON).click()
    page.locator(".qel-panel").wait_for()
    return page.locator(".qel-panel")


def wait_for(condition: Callable[[], Any], page: Any, timeout: float = 60.0) -> float:
    """Seconds until the condition holds; page events are processed meanwhile."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, page.locator(".qel-panel").inner_text()
        page.wait_for_timeout(100)
    return time.monotonic() - started


def read_status(page: Any, name: str) -> str:
    row = page.locator("button.qel-job", has_text=name)
    return row.locator(".qel-status").inner_text() if row.count() else ""


def read_step(page: Any, name: str) -> int:
    row = page.locator("button.qel-job", has_text=name)
    return int(row.inner_text().split("step ")[1].split(" of ")[0]) if row.count() else -1


def press(page: Any, action: str) -> None:
    page.locator(f".qel-panel [data-action={action}]").click()


def read_job_view(page: Any, node: str) -> str:
    """The text of the job shown on a node."""
    return page.evaluate(
        """type => app.graph._nodes.find(n => n.comfyClass === type).widgets
            .find(w => w.name === 'report_view').element
            .querySelector('.qel-job-view').innerText""",
        node,
    )


def press_and_answer(page: Any, action: str, answer: str) -> None:
    press(page, action)
    page.get_by_role("button", name=answer, exact=True).click()


def reach_panel(page: Any) -> None:
    """On a page that was just opened."""
    page.wait_for_function("window.app?.graph && window.app?.extensionManager")
    page.wait_for_timeout(1000)
    page.keyboard.press("Escape")
    open_panel(page)


def test_a_training_started_by_the_button_is_watched_and_steered_from_the_panel(workspace, host):
    page, name = workspace.page, "from the button"
    workspace.open_template("6 Train a LoRA")
    workspace.set_widgets(QUICK)
    open_panel(page)
    assert "No training yet" in page.locator(".qel-panel").inner_text()
    assert workspace.run()["status"]["status_str"] == "success"
    assert wait_for(lambda: read_status(page, name), page) < 5
    job_id = host.store.list()[-1].id
    wait_for(lambda: host.store.get(job_id).state.step > 0, page)
    assert wait_for(lambda: read_step(page, name) > 0, page) < 5
    assert page.locator(TAB_BUTTON).locator(BADGE).inner_text() == "1"
    for node in ("QwenEditLoraTrain", "QwenEditLoraJob"):
        assert f"of {MANY}" in read_job_view(page, node)

    # another page shows the same, and so does this one after a reload
    other = page.context.new_page()
    other.goto(host.server.url)
    reach_panel(other)
    page.reload()
    reach_panel(page)
    for one in (page, other):
        wait_for(lambda one=one: read_step(one, name) > 0, one)
        assert read_status(one, name) == "training"
    assert abs(read_step(page, name) - read_step(other, name)) < 2000

    # ComfyUI is restarted below the open pages
    host.restart()
    reached = host.store.get(job_id).state.step
    wait_for(lambda: read_step(page, name) > reached, page, timeout=90)

    page.locator("button.qel-job", has_text=name).click()
    chip = page.locator(".qel-page .qel-status")
    page.locator(".qel-chart-canvas").first.wait_for()
    press(page, "pause")
    wait_for(lambda: chip.inner_text() == "paused", page)
    wait_for(lambda: read_status(other, name) == "paused", other)
    paused_at = host.store.get(job_id).state.step
    press(page, "resume")
    wait_for(lambda: chip.inner_text() == "training", page)
    wait_for(lambda: host.store.get(job_id).state.step > paused_at, page)
    page.wait_for_timeout(1000)
    workspace.shoot("panel_job")
    press_and_answer(page, "cancel", "Keep training")
    assert page.evaluate("document.activeElement.dataset.action") == "cancel"
    press_and_answer(page, "cancel", "Stop and save")
    wait_for(lambda: chip.inner_text() == "cancelled", page)
    wait_for(lambda: read_status(other, name) == "cancelled", other)
    assert host.store.get(job_id).status is JobStatus.CANCELLED

    # confirmed first, then gone on both pages
    press_and_answer(page, "delete", "Back")
    assert host.store.get(job_id).status is JobStatus.CANCELLED
    press(page, "delete")
    assert page.evaluate("document.activeElement.innerText") == "Back"  # not what deletes
    page.locator("dialog .qel-button-danger").click()
    for one in (page, other):
        wait_for(lambda one=one: one.locator("button.qel-job").count() == 0, one)
    assert host.store.list() == []
    assert workspace.errors == []


def make_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, count + 1):
        loss = 0.1 + 0.4 * 0.999**step + 0.05 * ((step * 7919) % 13) / 13
        row = {"step": step, "loss": loss, "smoothed_loss": 0.12 + 0.4 * 0.999**step}
        row |= {"learning_rate": 1e-4, "grad_norm": loss * 3, "seconds": 1.5, "tokens_per_s": 900}
        row["memory_bytes"] = 21_000_000_000
        if step % 25 == 0:
            row["health"] = {"std": step * 1e-8, "spectral": 0.1, "effective_rank": 9.5}
        rows.append(row)
    return rows


def test_hostile_names_and_lines_are_text_and_failures_say_what_to_do(workspace, host):
    page = workspace.page
    model = host.material / f"{HOSTILE}.safetensors"
    try:
        model.symlink_to(host.material / "tiny_fp32_2509.safetensors")
    except OSError:
        pytest.skip("this file system has no such names")
    now = time.time()
    failure = JobFailure(sentence=f"no room for {HOSTILE}", advice=(f"free {HOSTILE}", "or less"))
    state = JobState(
        **{"status": JobStatus.FAILED, "created_at": now, "queued_at": now, "ended_at": now},
        **{"step": 40, "num_steps": 100, "failure": failure},
        **{"notes": (f"note {HOSTILE}",), "alarms": (f"alarm {HOSTILE}",)},
    )
    job_id = host.add_job(
        state,
        make_rows(40),
        log=f"2026-01-01 {HOSTILE}\n",
        name="it's &lt;b&gt; bold",
        **{"model.source": str(model)},
    )
    panel = open_panel(page)
    page.locator("button.qel-job", has_text="it's &lt;b&gt; bold").click()
    panel.locator(".qel-chart-canvas").first.wait_for()
    for summary in panel.locator("summary").all():
        summary.click()
    wait_for(lambda: "2026-01-01" in panel.locator(".qel-log").inner_text(), page)
    text = panel.inner_text()
    for part in ("no room for", "free", "note", "alarm", "2026-01-01"):
        assert f"{part} {HOSTILE}" in text
    assert f"{HOSTILE}.safetensors" in text  # the model, without its folder
    assert str(host.material) not in text
    assert panel.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None
    workspace.shoot("panel_failed_job")
    host.store.delete(job_id)
    model.unlink()
    assert workspace.errors == []


def test_a_failure_and_its_advice_are_chinese_in_a_chinese_page(chinese, host):
    page, now = chinese.page, time.time()
    config = make_train(host.material)
    state = JobState(
        **{"status": JobStatus.FAILED, "created_at": now, "queued_at": now, "ended_at": now},
        **{"step": 40, "num_steps": 100, "failure": explain_error(MemoryError(), config)},
    )
    job_id = host.add_job(state, name="too large")
    assert host.store.get(job_id).state.failure.sentence.startswith(
        "the computer ran out of memory"
    )
    panel = open_panel(page)
    page.locator("button.qel-job", has_text="too large").click()
    wait_for(lambda: "计算机内存不足；请降低此次训练的需求并克隆任务" in panel.inner_text(), page)
    assert "以更小的尺寸或更少的参考缓存训练集" in panel.inner_text()
    format_js = "import('/extensions/qwen-edit-lora/format.js')"
    assert page.evaluate(f"{format_js}.then(m => m.formatDuration(12000))") == "3 小时 20 分钟"
    assert "年" in page.evaluate(f"{format_js}.then(m => m.formatDate(1e9))")
    chinese.shoot("chinese_failed_job")
    host.store.delete(job_id)
    assert chinese.errors == []


def read_toasts(page: Any) -> str:
    return " ".join(page.locator(TOAST).all_inner_texts())


def test_a_failure_is_announced_at_once_and_ended_trainings_at_the_next_visit(workspace, host):
    page = workspace.page
    broken = host.material / "broken.safetensors"
    broken.write_bytes(b"no safetensors at all")
    wait_for(lambda: page.evaluate("localStorage.getItem('qwen_edit_lora.seen_until')"), page)
    job_id = host.store.submit(make_train(host.material, **{"model.source": str(broken)}))
    wait_for(lambda: "tiny failed" in read_toasts(page), page, timeout=120)
    sentence = host.store.get(job_id).state.failure.sentence
    assert "broken.safetensors" in sentence
    assert sentence in read_toasts(page)

    page.goto("about:blank")
    later = time.time() + 60
    state = JobState(status=JobStatus.COMPLETED, created_at=later, queued_at=later, ended_at=later)
    made = host.add_job(state, name="overnight")
    workspace.open()
    wait_for(lambda: "Trained since you were last here" in read_toasts(page), page)
    assert "overnight" in read_toasts(page)
    assert "Failed since" not in read_toasts(page)  # that was seen
    for one in (job_id, made):
        host.store.delete(one)
    assert workspace.errors == []


@pytest.mark.nightly  # it measures time
def test_ten_thousand_steps_and_two_hundred_jobs_update_within_a_tenth_of_a_second(workspace, host):
    page, now = workspace.page, time.time()
    ended = {"status": JobStatus.COMPLETED, "num_steps": 10_000, "step": 10_000}
    rows = make_rows(10_000)
    times = {"created_at": now + 1, "queued_at": now + 1, "ended_at": now + 2}
    large = host.add_job(JobState(**ended, **times), rows, name="ten thousand")
    template = host.store.catalog.find(large)
    settings = template.read_settings()
    for i in range(199):
        folder = JobFolder(host.root / "jobs" / f"20260101-{i:06d}-{i:08x}")
        folder.path.mkdir()
        folder.write_settings(settings)
        folder.write_state(JobState(**ended, created_at=now - i, queued_at=now), durable=False)
    panel = open_panel(page)
    wait_for(lambda: panel.locator("button.qel-job").count() == 200, page)
    panel.locator("button.qel-job").first.click()
    panel.locator(".qel-chart-canvas").first.wait_for()
    label = panel.locator(".qel-chart-canvas").first.get_attribute("aria-label")
    assert "steps 1 to 10000" in label
    for step in range(10):  # a training of which every event brings news
        page.evaluate(
            """([id, step]) => app.api.dispatchCustomEvent('qwen_edit_lora.job',
                {...window.__job, id, step})""",
            [large, step],
        ) if step else page.evaluate(
            """async id => { window.__job = (await (await app.api.fetchApi(
                '/qwen_edit_lora/jobs')).json()).jobs.find(job => job.id === id) }""",
            large,
        )
        page.wait_for_timeout(300)
    page.wait_for_timeout(1500)
    panel.get_by_role("button", name="Back to the list").click()
    for step in range(10):
        page.evaluate(
            """([id, step]) => app.api.dispatchCustomEvent('qwen_edit_lora.job',
                {...window.__job, id, step})""",
            [large, step],
        )
        page.wait_for_timeout(100)
    durations = page.evaluate(
        """() => Object.fromEntries(['page', 'update'].map(name => [name, performance
            .getEntriesByName(`qwen_edit_lora.${name}`).map(e => e.duration)]))"""
    )
    for name, values in durations.items():
        assert len(values) >= 2, durations
        assert sorted(values)[len(values) // 2] < 100, (name, values)
    workspace.shoot("panel_two_hundred_jobs")
    assert workspace.errors == []
