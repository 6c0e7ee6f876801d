"""The sweep workflows, used like a user: opened from Templates, run, changed, run again."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.web, pytest.mark.comfy]

RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
#: Smaller and fewer than in the workflow, which is for a GPU.
QUICK = {"megapixels": 0.06, "steps": 1, "cfg": 1, "sigmas": "0.6"}

SET_STRENGTHS = """text => {
    const sweep = app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraSweep');
    sweep.widgets.find(w => w.name === 'strengths').value = text;
}"""
FIT_VIEW = """type => {
    const node = app.graph._nodes.find(n => n.comfyClass === type);
    const view = app.canvas.ds;
    view.scale = Math.min(1000 / (node.size[0] + 80), 850 / (node.size[1] + 120));
    view.offset = [80 / view.scale - node.pos[0], 80 / view.scale - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""


def open_quickly(workspace: Any, name: str) -> None:
    workspace.open_template(name)
    # A new seed each time: a fully cached sweep shows only the report's head.
    workspace.set_widgets({**QUICK, "seed": int(name[:2])})


def run(workspace: Any) -> dict[str, Any]:
    """The history entry."""
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    return entry


def shoot(workspace: Any, name: str, *node_types: str) -> None:
    for node_type in node_types:
        workspace.page.evaluate(FIT_VIEW, node_type)
        workspace.page.wait_for_timeout(500)
        workspace.shoot(f"{name}_{node_type}")


def find_sheet(workspace: Any, entry: dict[str, Any], prefix: str) -> Image.Image:
    """The contact sheet the grid saved, with the workflow in the file."""
    (saved,) = (
        image
        for output in entry["outputs"].values()
        for image in output.get("images", [])
        if image["type"] == "output" and image["filename"].startswith(prefix)
    )
    query = {key: saved[key] for key in ("filename", "subfolder", "type")}
    sheet = Image.open(io.BytesIO(workspace.server.request("/view", query)))
    assert {"prompt", "workflow"} <= set(sheet.text)
    assert np.asarray(sheet.convert("RGB"), dtype=np.float32).std() > 5  # not a single colour
    return sheet


def test_the_strength_sweep_opens_from_templates_runs_and_takes_another_strength(workspace):
    open_quickly(workspace, "4 Find the strength")
    entry = run(workspace)
    for reports in workspace.read_in_both_renderers("04"):
        assert "matched 20 modules, 60 of 60 keys" in reports["QwenEditLoraLoad"]
        assert "changes the output by" in reports["QwenEditLoraEffect"]
        assert "for a sweep: 0, " in reports["QwenEditLoraEffect"]
        assert reports["QwenEditLoraSweep"].startswith("4 images: strengths 0, 0.5, 1, 2")
        assert "20 of 20 modules matched" in reports["QwenEditLoraSweep"]
        assert "source as a whole: SSIM" in reports["QwenEditLoraSweepGrid"]
    shoot(workspace, "04_vue", "QwenEditLoraEffect", "QwenEditLoraSweep", "QwenEditLoraSweepGrid")
    first = find_sheet(workspace, entry, "sweep_")

    workspace.page.evaluate(SET_STRENGTHS, "0, 0.5, 1, 1.5, 2")
    entry = run(workspace)
    reports = workspace.wait_for_reports()
    assert reports["QwenEditLoraSweep"].startswith("5 images: strengths 0, 0.5, 1, 1.5, 2")
    second = find_sheet(workspace, entry, "sweep_")
    assert second.size[0] > first.size[0]
    assert workspace.errors == []


@RENDERERS
def test_a_wrong_strength_is_shown_on_the_page_and_the_rest_goes_on(workspace, vue_nodes):
    workspace.set_vue_nodes(vue_nodes)
    open_quickly(workspace, "4 Find the strength")
    workspace.page.evaluate(SET_STRENGTHS, "0..2")
    workspace.page.get_by_test_id("queue-button").click()
    sentence = workspace.page.get_by_text("strengths is '0..2'; expected finite numbers")
    sentence.first.wait_for()
    workspace.shoot(f"04_wrong_strength_{'vue' if vue_nodes else 'classic'}")
    assert sentence.count() == 1
    workspace.page.evaluate("fetch('/interrupt', {method: 'POST'})")
    assert workspace.errors == []


def test_the_checkpoint_sweep_opens_from_templates_and_compares_a_run(workspace):
    open_quickly(workspace, "5 Compare checkpoints")
    entry = run(workspace)
    names = [f"my_run-000{number}" for number in (100, 200, 300)]
    for reports in workspace.read_in_both_renderers("05"):
        assert (
            f"adapters: {'; '.join(names)}; strength 0 is the same for all"
            in (reports["QwenEditLoraSweep"])
        )
        for name in names:
            assert f"{name}: " in reports["QwenEditLoraSweepGrid"]
            assert f"{name}.safetensors: 20 of 20 modules matched" in reports["QwenEditLoraSweep"]
    shoot(workspace, "05_vue", "QwenEditLoraSweep", "QwenEditLoraSweepGrid")
    sheet = find_sheet(workspace, entry, "checkpoints_")
    assert sheet.size[1] > sheet.size[0]  # one row a checkpoint
    assert workspace.errors == []
