"""Image Pairs in the real page: the report, the contact sheet, and an error in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_base.pair_folders import write_pairs

pytestmark = [pytest.mark.web, pytest.mark.comfy]

READ = """() => app.graph._nodes.find(n => n.comfyClass === 'QwenEditDataset')
    .widgets.find(w => w.name === 'report_view').element
    .querySelector('.qwen-edit-lora-report').textContent"""

BUILD = """async () => {
    await app.loadApiJson({
        1: {class_type: 'CLIPLoader', inputs: {
            clip_name: 'qwen_2.5_vl_7b_fp8_scaled.safetensors', type: 'qwen_image'}},
        2: {class_type: 'VAELoader', inputs: {vae_name: 'qwen_image_vae.safetensors'}},
        3: {class_type: 'QwenEditDataset', inputs: {clip: ['1', 0], vae: ['2', 0],
            folder: 'datasets/web_pairs', variant: '2509 / 2511', megapixels: 0.01,
            captions: '', check_only: false, on_problem: 'stop', reference_folders: '',
            reference_megapixels: 0.01}},
    }, 'dataset');
}"""


def test_the_node_shows_its_report_and_the_pairs_or_what_stops_it(workspace, base_directory: Path):
    page = workspace.page
    folder = write_pairs(base_directory / "datasets" / "web_pairs", 4, width=240, height=160)
    try:
        page.evaluate(BUILD)
        page.wait_for_timeout(500)
        assert workspace.run()["status"]["status_str"] == "success"
        page.wait_for_timeout(1500)
        report = page.evaluate(READ)
        assert "4 of 4 pairs can be used" in report
        assert "pairs encoded: 4, already cached: 0" in report
        workspace.shoot("dataset")
        (folder / "control" / "photo_1.png").write_bytes(b"")
        (folder / "target" / "photo_2.txt").unlink()
        assert workspace.run()["status"]["status_str"] == "error"
        page.wait_for_timeout(1000)
        report = page.evaluate(READ)
        assert report.startswith("control/photo_1.png is an empty file; expected a PNG")
        assert "target/photo_2.png has no caption" in report
        workspace.shoot("dataset_error")
        assert workspace.errors == []
    finally:
        shutil.rmtree(folder)
