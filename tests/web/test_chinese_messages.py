"""What the extension says on the nodes of the real page, in Chinese."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.web, pytest.mark.comfy]


@pytest.fixture
def loras(demo_models: Any) -> Any:
    """A file with skipped keys, and one for another model."""
    folder = demo_models.root / "loras"
    state_dict = load_file(demo_models.lora)
    state_dict["diffusion_model.nowhere.lora_A.weight"] = torch.zeros(4, 4)
    save_file(state_dict, folder / "chinese_findings.safetensors")
    foreign = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}
    save_file(foreign, folder / "chinese_foreign.safetensors")
    yield folder
    for path in folder.glob("chinese_*.safetensors"):
        path.unlink()


def load_and_inspect(page: Any, lora_name: str) -> None:
    page.evaluate(
        """async name => {
            await app.loadApiJson({
                1: {class_type: 'QwenEditLoraLoad', inputs: {lora_name: name}},
                2: {class_type: 'QwenEditLoraInspect', inputs: {
                    adapter: ['1', 0], statistic: 'std', exact: false, sort_by: 'std',
                    base_model: 'none'}},
            }, 'chinese');
        }""",
        lora_name,
    )
    page.wait_for_timeout(500)


def test_reports_findings_and_a_red_node_are_chinese(loras: Path, chinese: Any):
    page = chinese.page  # loaded after the files were made
    load_and_inspect(page, "chinese_findings.safetensors")
    assert chinese.run()["status"]["status_str"] == "success"
    reports = chinese.wait_for_reports()
    assert "61 个键中有 1 个未加载" in reports["QwenEditLoraLoad"]
    assert "标准差" in reports["QwenEditLoraInspect"]
    assert "not loaded" not in reports["QwenEditLoraLoad"]
    assert "known-good" not in reports["QwenEditLoraInspect"]
    chinese.shoot("chinese_reports")

    load_and_inspect(page, "chinese_foreign.safetensors")
    status = chinese.run()["status"]
    assert status["status_str"] == "error"
    (details,) = (one for event, one in status["messages"] if event == "execution_error")
    assert "与 Qwen-Image 匹配 0 个模块" in details["exception_message"]
    assert details["exception_type"].endswith("KeyFormatError")
    chinese.shoot("chinese_error")
    assert chinese.errors == []
