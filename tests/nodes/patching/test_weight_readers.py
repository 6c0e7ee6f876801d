"""ComfyUI's own savers and mergers behind Apply, Stack and Sweep: their output has the LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.prompts import node
from qwen_edit_lora.lora_core import compute_delta, read_adapter
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

LORA = "for_savers.safetensors"
BASE = "tiny_fp32_2509.safetensors"
STRENGTH = 0.5
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module", autouse=True)
def lora(demo_models: Any) -> Iterator[Path]:
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    yield make_adapter(path, demo_models.dit["2509_fp32"], rank=4, delta_std=0.05)
    path.unlink()


@pytest.fixture
def output(base_directory: Path) -> Path:
    return base_directory / "output"


def build_graph(mode: str = "auto", applied: str = "QwenEditLoraApply", **more: Any) -> dict:
    inputs = {
        "QwenEditLoraApply": {"adapter": ["load", 0], "strength": STRENGTH},
        "QwenEditLoraStack": {
            "adapters.adapter_0": ["load", 0],
            "strengths": str(STRENGTH),
            "files": "0 files",
        },
    }[applied]
    return {
        "unet": node("UNETLoader", unet_name=BASE, weight_dtype="default"),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
        "apply": node(applied, model=["unet", 0], mode=mode, **inputs),
        **more,
    }


def compute_patched(base: dict[str, torch.Tensor], lora: Path, strength: float) -> dict:
    """Path -> the merged weight, for every module of the LoRA."""
    adapter = read_adapter(lora)
    names = {path: next(k for k in base if k.endswith(f"{path}.weight")) for path in adapter}
    return {
        path: base[names[path]] + strength * compute_delta(adapter.modules[path], base[names[path]])
        for path in adapter
    }


def check_saved(file: Path, expected: dict[str, torch.Tensor]) -> None:
    saved = load_file(file)
    assert len(expected) > 0
    for path, weight in expected.items():
        found = saved[f"{PREFIX}{path}.weight"]
        assert (found.float() - weight).abs().max() <= 1e-5, path


def read_output(entry: dict[str, Any], name: str = "apply") -> tuple[str, list[dict]]:
    """The report, and the findings beside it."""
    shown = entry["outputs"][name]
    return shown["qwen_edit_lora_report"][0], shown["qwen_edit_lora_findings"]


@pytest.mark.parametrize("applied", ["QwenEditLoraApply", "QwenEditLoraStack"])
def test_a_saved_model_holds_the_lora_also_where_apply_ran_before(
    server, output, demo_models, lora, applied
):
    folder = f"saved_by_{applied}"
    watch = node("PreviewAny", source=["apply", 1])
    before = server.run_prompt(build_graph(applied=applied, watch=watch))
    assert "side path: 24 modules" in read_output(before)[0]
    save = node("ModelSave", model=["apply", 0], filename_prefix=f"{folder}/model")
    entry = server.run_prompt(build_graph(applied=applied, watch=watch, save=save))
    report, findings = read_output(entry)
    line = "merged into the weights: 24 modules (ModelSave after this node reads the weights)"
    assert line in report.splitlines()
    merged = {"kind": "merged_instead", "severity": "note", "text": line, "count": 24}
    assert merged in findings
    (file,) = (output / folder).glob("*.safetensors")
    check_saved(file, compute_patched(load_file(demo_models.dit["2509_fp32"]), lora, STRENGTH))
    # and back: without the saver nothing touches the weights
    after = server.run_prompt(build_graph(applied=applied, watch=watch))
    assert "side path: 24 modules" in read_output(after)[0]


def test_a_saver_behind_nodes_that_pass_the_model_on_is_detected(server, output, demo_models, lora):
    more = {
        "shift": node("ModelSamplingAuraFlow", model=["apply", 0], shift=3.0),
        "again": node(
            "QwenEditLoraApply", model=["shift", 0], adapter=["load", 0], strength=1.0, mode="auto"
        ),
        "save": node("ModelSave", model=["again", 0], filename_prefix="saved_chain/model"),
    }
    entry = server.run_prompt(build_graph(**more))
    for name in ("apply", "again"):
        assert "ModelSave after this node reads the weights" in read_output(entry, name)[0]
    (file,) = (output / "saved_chain").glob("*.safetensors")
    base = load_file(demo_models.dit["2509_fp32"])
    check_saved(file, compute_patched(base, lora, STRENGTH + 1.0))


MERGES = {
    "ModelMergeSimple": (["apply", 0], ["unet", 0], {"ratio": 0.25}, 0.25),
    "ModelMergeAdd": (["unet", 0], ["difference", 0], {}, 1.0),
}


@pytest.mark.parametrize("name", MERGES)
def test_merged_models_hold_the_lora(server, output, demo_models, lora, name):
    first, second, options, share = MERGES[name]
    subtract = {"model1": ["apply", 0], "model2": ["unet", 0], "multiplier": 1.0}
    more = {
        "merge": node(name, model1=first, model2=second, **options),
        "save": node("ModelSave", model=["merge", 0], filename_prefix=f"saved_{name}/model"),
    }
    if name == "ModelMergeAdd":
        more["difference"] = node("ModelMergeSubtract", **subtract)
    entry = server.run_prompt(build_graph(**more))
    assert "merged into the weights: 24 modules" in read_output(entry)[0]
    (file,) = (output / f"saved_{name}").glob("*.safetensors")
    base = load_file(demo_models.dit["2509_fp32"])
    check_saved(file, compute_patched(base, lora, share * STRENGTH))


def test_a_requested_side_path_is_reported_as_missing_from_the_file(server, output):
    save = node("ModelSave", model=["apply", 0], filename_prefix="saved_beside/model")
    entry = server.run_prompt(build_graph(mode="side path", save=save))
    report, findings = read_output(entry)
    (reported,) = (one for one in findings if one["kind"] == "not_in_weights")
    assert (reported["severity"], reported["count"]) == ("warning", 24)
    assert reported["text"].startswith(
        "ModelSave after this node reads the weights alone, so that 24"
    )
    assert f"Warning: {reported['text']}" in report.splitlines()
    assert entry["outputs"]["apply"]["qwen_edit_lora_warning"] == [True]
    assert reported["text"] in server.log.read_text(errors="replace")


def test_a_saver_beside_apply_changes_nothing(server):
    more = {
        "save": node("ModelSave", model=["unet", 0], filename_prefix="saved_base/model"),
        "watch": node("PreviewAny", source=["apply", 1]),
    }
    assert "side path: 24 modules" in read_output(server.run_prompt(build_graph(**more)))[0]


def test_the_models_of_a_sweep_are_merged_for_a_saver(server, output, demo_models, lora):
    def sweep(**more: Any) -> dict:
        graph = build_graph(
            sweep=node(
                "QwenEditLoraSweep",
                model=["unet", 0],
                adapter=["load", 0],
                strengths=f"0, {STRENGTH}",
                seed=0,
                steps=1,
                cfg=1.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            ),
            watch=node("PreviewAny", source=["sweep", 6]),
            **more,
        )
        del graph["apply"]
        return graph

    server.run_prompt(sweep())
    save = node("ModelSave", model=["sweep", 4], filename_prefix="saved_sweep/model")
    server.run_prompt(sweep(save=save))
    files = sorted((output / "saved_sweep").glob("*.safetensors"))
    base = load_file(demo_models.dit["2509_fp32"])
    assert len(files) == 2
    check_saved(files[0], compute_patched(base, lora, 0.0))
    check_saved(files[1], compute_patched(base, lora, STRENGTH))
