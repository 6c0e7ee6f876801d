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
    entry = workspace.run()
    assert entry["status"]["status_str"] == "success"
    (picture,) = server.images(entry)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.float32)
    assert min(pixels.shape[:2]) >= 512
    assert pixels.std() > 5  # not a single colour
    workspace.page.wait_for_timeout(1000)
    reports = workspace.read_reports()
    workspace.shoot(f"01_apply_lora_{'vue' if vue_nodes else 'classic'}")
    assert "matched 24 modules, 48 of 48 keys" in reports["QwenEditLoraLoad"]
    assert "side path: 24 modules" in reports["QwenEditLoraApply"]
    assert workspace.errors == []
