"""The shipped workflows, opened from the Templates dialog and run by the Run button."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.web, pytest.mark.comfy]

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


def test_the_apply_workflow_opens_from_templates_and_runs(workspace, server):
    workspace.open_template("1 Apply a LoRA")
    workspace.set_widgets({"lora_name": "my_edit_lora.safetensors"})
    workspace.set_widgets({"steps": 2, "cfg": 1})  # 20 of a megapixel take minutes on a CPU
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    (picture,) = server.images(entry)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
    assert min(pixels.shape[:2]) >= 512
    assert pixels.std() > 5  # not a single colour
    for reports in workspace.read_in_both_renderers("1 Apply a LoRA"):
        assert "matched 20 modules, 60 of 60 keys" in reports["QwenEditLoraLoad"]
        assert "side path: 20 modules" in reports["QwenEditLoraApply"]
    assert workspace.errors == []


WORKFLOWS_WITHOUT_A_MODEL = {
    "2 Inspect a LoRA": {
        "QwenEditLoraLoad": "matched 20 modules, 60 of 60 keys",
        "QwenEditLoraInspect": "strong: std",  # so that its effect is seen
    },
    "3 Compare and resize LoRAs": {
        "QwenEditLoraResize": "of the energy kept; least in",
        "QwenEditLoraCompare": "20 modules compared, 0 only in a, 0 only in b",
        "QwenEditLoraSave": "Wrote loras/my_edit_lora_resized_",
    },
}


@pytest.mark.parametrize("name", WORKFLOWS_WITHOUT_A_MODEL)
def test_a_workflow_without_a_model_opens_from_templates_and_runs(workspace, server, name):
    workspace.open_template(name)
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    for reports in workspace.read_in_both_renderers(name):
        for node_type, text in WORKFLOWS_WITHOUT_A_MODEL[name].items():
            assert text in reports[node_type]
    for picture in server.images(entry):
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
        assert pixels.shape == (1024, 1024, 3)
        assert pixels.std() > 5  # not a single colour
    assert workspace.errors == []


def test_a_workflow_opened_in_the_newer_renderer_runs_and_reports(workspace):
    workspace.set_vue_nodes(True)
    workspace.open_template("3 Compare and resize LoRAs")
    assert workspace.run()["status"]["status_str"] == "success"
    reports = workspace.wait_for_reports()
    for node_type, text in WORKFLOWS_WITHOUT_A_MODEL["3 Compare and resize LoRAs"].items():
        assert text in reports[node_type]
    assert workspace.errors == []


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_every_workflow_opens_from_templates_in_the_newer_renderer(workspace, server, name):
    if "2.1" in name and "TextEncodeQwenImage21" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no nodes of Qwen-Image-2.1, which come with 0.37")
    workspace.set_vue_nodes(True)
    workspace.open_template(name)
    workspace.page.locator("[data-node-id]").first.wait_for()
    drawn = workspace.page.evaluate("document.querySelectorAll('[data-node-id]').length")
    assert drawn == workspace.page.evaluate("app.graph._nodes.length") > 3
    workspace.shoot(f"{name}_opened_vue")
    assert workspace.errors == []
