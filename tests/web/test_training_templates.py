"""The training workflows, used like a user: opened from Templates, run, viewed again."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.web, pytest.mark.comfy]

#: Smaller and shorter than in the workflow, which is for a GPU and a night.
QUICK = {"megapixels": 0.02, "reference_megapixels": 0.02, "batch_size": 2, "sample_every": 10}
TRAINING_STEPS = 20
RENDER_STEPS = 1
TRAINING_TIMEOUT = 240.0  # seconds
VIEW_TIMEOUT = 60.0  # seconds


#: The images that Training Job shows.
COUNT_PLOTS = """() => {
    const node = app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraJob');
    return app.nodeOutputs[node.id]?.images?.length ?? 0;
}"""


def open_quickly(workspace: Any, name: str) -> None:
    workspace.open_template(name)
    workspace.set_widgets({**QUICK, "name": name, "steps": RENDER_STEPS, "cfg": 1})
    workspace.set_widgets({"steps": TRAINING_STEPS}, "QwenEditLoraTrain")


def run(workspace: Any) -> dict[str, str]:
    """The reports on the nodes after a run, after checking that no image is blank."""
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success", entry["status"]
    pictures = workspace.server.images(entry)
    assert pictures
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
        assert pixels.std() > 1  # not a single colour
    return workspace.wait_for_reports()


def read_job_view(workspace: Any, node_type: str) -> dict[str, Any]:
    """What a node shows of its training: text, and whether there are a curve and an image."""
    return workspace.page.evaluate(
        """type => {
            const node = app.graph._nodes.find(n => n.comfyClass === type);
            const element = node.widgets.find(w => w.name === 'report_view').element
                .querySelector('.qel-job-view');
            const image = element.querySelector('img');
            return {
                text: element.innerText,
                curve: element.querySelector('canvas').getAttribute('aria-label') ?? '',
                isPictureSeen: !image.hidden && image.naturalWidth > 0,
                isInNode: element.getBoundingClientRect().height > 0,
            };
        }""",
        node_type,
    )


def wait_for_view(
    workspace: Any, node_type: str, is_there: Callable[[dict[str, Any]], bool]
) -> None:
    """Returns once a node shows what is expected of its training; it asks every 3 s."""
    deadline = time.monotonic() + VIEW_TIMEOUT
    while not is_there(view := read_job_view(workspace, node_type)):
        assert time.monotonic() < deadline, view
        workspace.page.wait_for_timeout(200)


def shows_the_end(view: dict[str, Any]) -> bool:
    return (
        f"step {TRAINING_STEPS} of {TRAINING_STEPS}" in view["text"]
        and f"steps 1 to {TRAINING_STEPS}: Loss from" in view["curve"]
        and view["isPictureSeen"]
        and view["isInNode"]
    )


def wait_for_completion(server: Any, name: str) -> None:
    deadline = time.monotonic() + TRAINING_TIMEOUT
    while time.monotonic() < deadline:
        jobs = [j for j in server.get("/qwen_edit_lora/jobs")["jobs"] if j["name"] == name]
        if any(job["status"] == "completed" for job in jobs):
            return
        time.sleep(0.5)
    raise AssertionError(f"{name} was not trained in time: {jobs}")


def test_a_training_starts_with_run_and_shows_its_end_with_the_next_run(workspace, server):
    name = "6 Train a LoRA"
    open_quickly(workspace, name)
    reports = run(workspace)
    assert "12 of 12 pairs can be used" in reports["QwenEditDataset"]
    assert "trainable parameters" in reports["QwenEditLoraTrain"]
    assert workspace.page.evaluate(COUNT_PLOTS) == 0  # one before the first step would stay there
    wait_for_completion(server, name)
    wait_for_view(workspace, "QwenEditLoraJob", lambda view: "completed" in view["text"])
    outdated = workspace.read_reports()  # from before the first step
    assert not re.search(r"step \d+ of", outdated["QwenEditLoraJob"])
    assert "trainable parameters" in outdated["QwenEditLoraTrain"]
    run(workspace)
    for reports in workspace.read_in_both_renderers(name):
        report = reports["QwenEditLoraTrain"]
        assert re.search(r"this training is already job [\w-]+: completed", report)
        assert f"completed, step {TRAINING_STEPS} of {TRAINING_STEPS}" in reports["QwenEditLoraJob"]
        assert f"LoRA: {name}.safetensors in models/loras" in reports["QwenEditLoraJob"]
        assert workspace.page.evaluate(COUNT_PLOTS) == 1
        for node_type in ("QwenEditLoraTrain", "QwenEditLoraJob"):
            wait_for_view(workspace, node_type, shows_the_end)
    assert workspace.errors == []


def test_one_graph_trains_waits_inspects_and_sweeps(workspace):
    open_quickly(workspace, "7 Train and sweep")
    reports = run(workspace)
    workspace.shoot("7 Train and sweep")
    assert f"completed, step {TRAINING_STEPS} of {TRAINING_STEPS}" in reports["QwenEditLoraJob"]
    assert "20 modules" in reports["QwenEditLoraInspect"]
    assert "3 images: strengths 0, 0.5, 1" in reports["QwenEditLoraSweep"]
    assert "suggested range" in reports["QwenEditLoraSweepGrid"]
    assert workspace.errors == []
