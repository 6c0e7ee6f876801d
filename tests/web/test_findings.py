"""Findings on the nodes of the real page: counted, in color, with kind and count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.pair_folders import write_pairs
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.web, pytest.mark.comfy]

READ = """type => {
    const view = app.graph._nodes.find(n => n.comfyClass === type)
        .widgets.find(w => w.name === 'report_view').element
        .querySelector('.qwen-edit-lora-report');
    return {
        summary: view.querySelector('.qwen-edit-lora-summary')?.textContent ?? null,
        rows: [...view.querySelectorAll('[data-kind]')].map(row => ({
            kind: row.dataset.kind, severity: row.dataset.severity, text: row.textContent,
            title: row.title, color: getComputedStyle(row).color,
            icon: getComputedStyle(row, '::before').content})),
        color: getComputedStyle(view).color,
        state: view.dataset.state,
        scripts: view.querySelectorAll('script, img').length,
        lines: view.innerText.split('\\n').length,
    };
}"""


@pytest.fixture
def odd_lora(demo_models: Any) -> Any:
    """A file with two skipped keys, one with markup in its name."""
    path = demo_models.root / "loras" / "with_findings.safetensors"
    state_dict = load_file(demo_models.lora)
    state_dict["<img src=x onerror=alert(1)>.lora_A.weight"] = torch.zeros(4, 4)
    state_dict["diffusion_model.nowhere.lora_A.weight"] = torch.zeros(4, 4)
    save_file(state_dict, path)
    yield path
    path.unlink()


def test_keys_skipped_by_load_are_a_colored_line_with_kind_and_count(workspace, odd_lora):
    page = workspace.page
    page.reload()
    page.wait_for_function("window.app?.graph && window.app?.extensionManager")
    page.evaluate(
        """async () => {
            await app.loadApiJson({
                1: {class_type: 'QwenEditLoraLoad', inputs: {
                    lora_name: 'with_findings.safetensors'}},
                2: {class_type: 'PreviewAny', inputs: {source: ['1', 2]}},
            }, 'findings');
        }"""
    )
    page.wait_for_timeout(500)
    assert workspace.run()["status"]["status_str"] == "success"
    page.wait_for_timeout(1000)
    shown = page.evaluate(READ, "QwenEditLoraLoad")
    assert shown["summary"].startswith("warnings: 1")
    (reported,) = (row for row in shown["rows"] if row["kind"] == "unmatched_keys")
    assert reported["severity"] == "warning"
    assert reported["title"] == "unmatched_keys: 2"
    assert "2 of " in reported["text"]
    assert "\u26a0" in reported["icon"]
    assert shown["state"] == "warning"
    assert {row["color"] for row in shown["rows"]} == {shown["color"]}  # readable in every theme
    assert shown["scripts"] == 0
    assert all(row["icon"] == "none" for row in shown["rows"] if row["severity"] == "note")
    workspace.shoot("findings_load")
    assert workspace.errors == []


def test_the_pairs_of_a_dataset_are_counted_with_what_was_left_out(workspace, base_directory: Path):
    page = workspace.page
    folder = write_pairs(base_directory / "datasets" / "web_findings", 4, width=240, height=160)
    try:
        (folder / "control" / "photo_1.png").write_bytes(b"")
        (folder / "garment").mkdir()
        shutil.copy(folder / "target" / "photo_0.png", folder / "garment" / "photo_0.png")
        page.evaluate(
            """async () => {
                await app.loadApiJson({
                    1: {class_type: 'CLIPLoader', inputs: {
                        clip_name: 'qwen_2.5_vl_7b_fp8_scaled.safetensors', type: 'qwen_image'}},
                    2: {class_type: 'VAELoader', inputs: {
                        vae_name: 'qwen_image_vae.safetensors'}},
                    3: {class_type: 'QwenEditDataset', inputs: {clip: ['1', 0], vae: ['2', 0],
                        folder: 'datasets/web_findings', variant: '2509 / 2511', megapixels: 0.01,
                        captions: '', check_only: true, on_problem: 'leave the pair out',
                        reference_folders: '', reference_megapixels: 0.01}},
                }, 'dataset');
            }"""
        )
        page.wait_for_timeout(500)
        assert workspace.run()["status"]["status_str"] == "success"
        page.wait_for_timeout(1000)
        shown = page.evaluate(READ, "QwenEditDataset")
        assert shown["summary"].startswith("3 of 4 pairs · warnings: ")
        kinds = {row["kind"]: row for row in shown["rows"]}
        assert kinds["pair_left_out"]["title"] == "pair_left_out: 1"
        assert kinds["pair_left_out"]["severity"] == "warning"
        assert len([row for row in shown["rows"] if row["severity"] == "warning"]) >= 2
        workspace.shoot("findings_dataset")
        assert workspace.errors == []
    finally:
        shutil.rmtree(folder)


LATE = """async ([source, finding]) => {
    const { api } = await import('/scripts/api.js');
    const node = app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraApply');
    const detail = {node: String(node.id), source, finding};
    api.dispatchEvent(new CustomEvent('qwen_edit_lora.finding', {detail}));
}"""
REPORT = """text => app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraApply').showReport({
    qwen_edit_lora_report: [text], qwen_edit_lora_warning: [false], qwen_edit_lora_findings: []
})"""


def test_what_sampling_finds_later_is_on_the_node_until_it_is_taken_back(workspace):
    page = workspace.page
    workspace.open_template("1 Apply a LoRA")
    page.evaluate(REPORT, "a.safetensors: 20 of 20 modules matched")
    text = "the model did not run 1 of the 20 modules"
    finding = {"kind": "modules_not_run", "severity": "warning", "text": text, "count": 1}
    page.evaluate(LATE, ["7.0.0.apply", finding])
    page.evaluate(LATE, ["7.0.0.other", finding])  # of another strength of a sweep
    # A cached run shows the same report again.
    page.evaluate(REPORT, "a.safetensors: 20 of 20 modules matched")
    found = page.evaluate(READ, "QwenEditLoraApply")
    assert [(row["kind"], row["text"]) for row in found["rows"]] == [("modules_not_run", text)]
    assert (found["state"], found["summary"]) == ("warning", "1 warning")
    page.evaluate(LATE, ["7.0.0.apply", None])
    page.evaluate(LATE, ["7.0.0.other", None])
    found = page.evaluate(READ, "QwenEditLoraApply")
    assert (found["rows"], found["state"]) == ([], "fine")
    page.evaluate(LATE, ["7", finding])
    page.evaluate(REPORT, "b.safetensors: 20 of 20 modules matched")
    assert page.evaluate(READ, "QwenEditLoraApply")["rows"] == []
    assert workspace.errors == []
