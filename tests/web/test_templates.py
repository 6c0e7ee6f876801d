"""The shipped workflows, opened from the Templates dialog and run by the Run button."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.web, pytest.mark.comfy]


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_the_apply_workflow_opens_from_templates_and_runs(workspace, server, vue_nodes):
    workspace.set_vue_nodes(vue_nodes)
    workspace.open_template("01_apply_lora")
    workspace.set_widgets({"steps": 2, "cfg": 1})  # 20 of a megapixel take minutes on a CPU
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    (picture,) = server.images(entry)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
    assert min(pixels.shape[:2]) >= 512
    assert pixels.std() > 5  # not a single colour
    workspace.page.wait_for_timeout(1000)
    reports = workspace.read_reports()
    workspace.shoot(f"01_apply_lora_{'vue' if vue_nodes else 'classic'}")
    assert "matched 20 modules, 60 of 60 keys" in reports["QwenEditLoraLoad"]
    assert "side path: 20 modules" in reports["QwenEditLoraApply"]
    assert workspace.errors == []


WORKFLOWS_WITHOUT_A_MODEL = {
    "02_inspect_lora": {
        "QwenEditLoraLoad": "matched 20 modules, 60 of 60 keys",
        "QwenEditLoraInspect": "strong: std",  # so that its effect is seen
    },
    "03_compare_and_resize": {
        "QwenEditLoraResize": "of the energy kept; least in",
        "QwenEditLoraCompare": "20 modules compared, 0 only in a, 0 only in b",
        "QwenEditLoraSave": "Wrote loras/my_edit_lora_resized_",
    },
}


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
@pytest.mark.parametrize("name", WORKFLOWS_WITHOUT_A_MODEL)
def test_a_workflow_without_a_model_opens_from_templates_and_runs(
    workspace, server, name, vue_nodes
):
    workspace.set_vue_nodes(vue_nodes)
    workspace.open_template(name)
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    workspace.page.wait_for_timeout(1000)
    reports = workspace.read_reports()
    workspace.shoot(f"{name}_{'vue' if vue_nodes else 'classic'}")
    for node_type, text in WORKFLOWS_WITHOUT_A_MODEL[name].items():
        assert text in reports[node_type]
    for picture in server.images(entry):
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
        assert pixels.shape == (1024, 1024, 3)
        assert pixels.std() > 5  # not a single colour
    assert workspace.errors == []
