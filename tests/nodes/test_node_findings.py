"""What is skipped, merged instead or decided by a rule: a line on the node, and a data entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.prompts import node
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

LORA = "with_all_kinds.safetensors"
SEVERITIES = {"error", "warning", "note"}


@pytest.fixture(scope="module", autouse=True)
def lora(demo_models: Any) -> Iterator[Path]:
    """A key without a module, a module that the tiny base lacks, and no alpha."""
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=4, delta_std=0.05)
    state_dict = load_file(path)
    down = next(tensor for key, tensor in state_dict.items() if "to_q.lora_A" in key)
    up = next(tensor for key, tensor in state_dict.items() if "to_q.lora_B" in key)
    absent = "diffusion_model.transformer_blocks.55.attn.to_q"
    state_dict |= {f"{absent}.lora_A.weight": down.clone(), f"{absent}.lora_B.weight": up.clone()}
    state_dict["diffusion_model.nowhere.lora_A.weight"] = torch.zeros(4, 4)
    save_file(state_dict, path)
    yield path
    path.unlink()


UNET = node("UNETLoader", unet_name="tiny_fp32_2509.safetensors", weight_dtype="default")
LOAD = node("QwenEditLoraLoad", lora_name=LORA)


def watch(name: str, output: int) -> dict[str, Any]:
    return node("PreviewAny", source=[name, output])


def read_findings(entry: dict[str, Any], name: str) -> tuple[dict[str, dict], list[str], bool]:
    """Findings by kind; the report's lines; whether the node is amber. Each finding ends a line."""
    outputs = [
        output
        for key, output in entry["outputs"].items()
        if entry["meta"][key]["display_node"] == name and "qwen_edit_lora_findings" in output
    ]
    shown = next((o for o in outputs if "qwen_edit_lora_node" not in o), outputs[-1])
    if len(outputs) > 1:  # a sweep: its own first lines, then all that its end collected
        shown = max(outputs, key=lambda output: len(output["qwen_edit_lora_report"][0]))
    lines = shown["qwen_edit_lora_report"][0].splitlines()
    findings = shown["qwen_edit_lora_findings"]
    for finding in findings:
        assert finding.keys() == {"kind", "severity", "text", "count"}
        assert finding["severity"] in SEVERITIES
        assert any(line.endswith(finding["text"]) for line in lines), finding
    return {one["kind"]: one for one in findings}, lines, shown["qwen_edit_lora_warning"][0]


def test_load_reports_skipped_keys_and_a_guessed_alpha(server):
    graph = {"load": LOAD, "watch": watch("load", 2)}
    found, lines, is_amber = read_findings(server.run_prompt(graph), "load")
    assert (found["unmatched_keys"]["severity"], found["unmatched_keys"]["count"]) == ("warning", 1)
    assert (found["alpha_from_rank"]["severity"], found["alpha_from_rank"]["count"]) == ("note", 25)
    assert f"Warning: {found['unmatched_keys']['text']}" in lines
    assert is_amber


def test_apply_reports_modules_missing_from_the_model(server):
    apply = node(
        "QwenEditLoraApply", model=["unet", 0], adapter=["load", 0], strength=1.0, mode="auto"
    )
    graph = {"unet": UNET, "load": LOAD, "apply": apply, "watch": watch("apply", 1)}
    found, lines, is_amber = read_findings(server.run_prompt(graph), "apply")
    assert (found["modules_absent"]["severity"], found["modules_absent"]["count"]) == ("warning", 1)
    assert f"Warning: {found['modules_absent']['text']}" in lines
    assert is_amber


def test_a_stack_reports_findings_from_reading_its_files_too(server):
    files = {"files": "1 file", "files.lora_1": LORA, "files.strength_1": 1.0}
    stack = node("QwenEditLoraStack", model=["unet", 0], mode="merge", strengths="1", **files)
    graph = {"unet": UNET, "stack": stack, "watch": watch("stack", 1)}
    found, _, is_amber = read_findings(server.run_prompt(graph), "stack")
    assert found.keys() >= {"unmatched_keys", "alpha_from_rank", "modules_absent", "merged"}
    assert found["unmatched_keys"]["text"].startswith(f"{LORA}: 1 of ")
    assert (found["merged"]["severity"], found["merged"]["count"]) == ("note", 24)
    assert is_amber


def test_a_sweep_reports_findings_from_reading_and_applying_its_files(server):
    settings = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0}
    sweep = node(
        "QwenEditLoraSweep",
        model=["unet", 0],
        strengths="0, 0.5, 1",
        loras=LORA,
        scheduler="simple",
        **settings,
    )
    graph = {"unet": UNET, "sweep": sweep, "watch": watch("sweep", 6)}
    found, _, is_amber = read_findings(server.run_prompt(graph), "sweep")
    assert found.keys() >= {"unmatched_keys", "alpha_from_rank", "modules_absent"}
    assert is_amber


def test_inspect_reports_the_same_on_the_node_and_in_its_json(server):
    inspect = node(
        "QwenEditLoraInspect", adapter=["load", 0], base_model=UNET["inputs"]["unet_name"]
    )
    graph = {"load": LOAD, "inspect": inspect, "json": watch("inspect", 1)}
    entry = server.run_prompt(graph)
    found, _, is_amber = read_findings(entry, "inspect")
    figures = json.loads(entry["outputs"]["json"]["text"][0])
    assert figures["findings"] == list(found.values())
    reported = found["modules_without_figures"]
    assert (reported["severity"], reported["count"]) == (
        "warning",
        1,
    )  # the base has no such module
    assert is_amber


def test_saving_reports_how_the_native_loader_will_read_the_file(server):
    save = node(
        "QwenEditLoraSave", adapter=["load", 0], key_format="peft", filename_prefix="x/peft"
    )
    found, lines, is_amber = read_findings(server.run_prompt({"load": LOAD, "save": save}), "save")
    assert (found["native_loads_nothing"]["count"], is_amber) == (25, True)
    assert f"Warning: {found['native_loads_nothing']['text']}" in lines
