"""Sweep Grid in a running server: what it shows, saves and refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_base.adapters import make_adapter
from demo_base.prompts import node
from demo_base.server import ComfyServer, PromptError
from PIL import Image

pytestmark = pytest.mark.comfy


def grid_graph(
    labels: str = "0\n0.5\n1", load_names: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    """Images from the input folder as one batch, with every output shown."""
    graph = {
        f"load_{n}": node("LoadImage", image=name) for n, name in enumerate(load_names, start=1)
    }
    batch = ["load_1", 0]
    for number in range(2, len(load_names) + 1):
        name = f"batch_{number}"
        graph[name] = node("ImageBatch", image1=batch, image2=[f"load_{number}", 0])
        batch = [name, 0]
    inputs = {"images": batch, "labels": labels, "filename_prefix": "grid_test/sheet", **more}
    graph["grid"] = node("QwenEditLoraSweepGrid", **inputs)
    for number, name in ((0, "report"), (4, "table"), (5, "json")):
        graph[name] = node("PreviewAny", source=["grid", number])
    for number, name in ((1, "sheet"), (2, "differences"), (3, "curve")):
        graph[name] = node("PreviewImage", images=["grid", number])
    return graph


@pytest.fixture
def cells(base_directory: Path) -> tuple[str, ...]:
    """Three images in the input folder: the photograph, slightly and much brighter."""
    photo = Image.open(base_directory / "input" / "example.png").convert("RGB").resize((96, 64))
    names = []
    for number, factor in enumerate((1.0, 1.05, 1.1)):
        name = f"cell_{number}.png"
        photo.point(lambda v, f=factor: min(255, round(v * f))).save(
            base_directory / "input" / name
        )
        names.append(name)
    return tuple(names)


def fetch(server: Any, image: dict[str, str]) -> Image.Image:
    query = {key: image[key] for key in ("filename", "subfolder", "type")}
    return Image.open(io.BytesIO(server.request("/view", query)))


def read_pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def test_the_node_shows_its_verdict_and_saves_the_sheet_with_the_graph(server, cells):
    graph = grid_graph(load_names=cells)
    graph["by_core"] = node("SaveImage", images=["grid", 1], filename_prefix="grid_test/by_core")
    outputs = server.run_prompt(graph)["outputs"]
    report = outputs["grid"]["qwen_edit_lora_report"][0]
    advice, verdict, *_ = report.splitlines()
    assert advice.startswith("Use strength 1: the change is visible (RMS ")
    assert verdict.startswith("smooth: the change grows from RMS ")
    assert outputs["grid"]["qwen_edit_lora_num_shown"] == [2]
    assert outputs["grid"]["qwen_edit_lora_warning"] == [False]
    assert outputs["report"]["text"][0].startswith(report)
    table = outputs["table"]["text"][0]
    assert outputs["report"]["text"][0].endswith(table)
    assert len(table.splitlines()) == 2 + 3
    figures = json.loads(outputs["json"]["text"][0])
    assert figures["advice"] == advice
    assert figures["adapters"][""]["kind"] == "smooth"
    assert [cell["strength"] for cell in figures["cells"]] == [0.0, 0.5, 1.0]
    (saved,) = outputs["grid"]["images"]
    assert (saved["type"], saved["subfolder"]) == ("output", "grid_test")
    sheet = fetch(server, saved)
    assert sheet.text == fetch(server, outputs["by_core"]["images"][0]).text
    assert json.loads(sheet.text["prompt"]).keys() == graph.keys()
    pictures = {
        n: fetch(server, outputs[n]["images"][0]) for n in ("sheet", "differences", "curve")
    }
    assert np.abs(read_pixels(sheet) - read_pixels(pictures["sheet"])).max() <= 1
    for picture in pictures.values():
        assert picture.size[0] >= 1024
        assert len(np.unique(read_pixels(picture).reshape(-1, 3), axis=0)) > 100


def test_the_workflow_of_the_page_is_in_the_file_too(server, cells):
    workflow = {"nodes": [], "note": "as the page would send it"}
    body = {
        "prompt": grid_graph(load_names=cells, thumbnail_px=128),
        "extra_data": {"extra_pnginfo": {"workflow": workflow}},
    }
    entry = server.wait_for_prompt(server.post("/prompt", body)["prompt_id"])
    (saved,) = entry["outputs"]["grid"]["images"]
    assert json.loads(fetch(server, saved).text["workflow"]) == workflow


def test_the_source_and_the_mask_add_their_metrics(server, cells):
    graph = grid_graph(load_names=cells, source=["load_1", 0], mask=["painted", 0], thumbnail_px=64)
    graph["painted"] = node("MaskComposite", operation="add", x=0, y=0)
    graph["painted"]["inputs"] |= {"destination": ["none", 0], "source": ["half", 0]}
    graph["none"] = node("SolidMask", value=0.0, width=96, height=64)
    graph["half"] = node("SolidMask", value=1.0, width=48, height=64)
    outputs = server.run_prompt(graph)["outputs"]
    report = outputs["grid"]["qwen_edit_lora_report"][0]
    assert "mask: at strength 1 RMS " in report
    assert "source outside the mask: SSIM " in report
    cell = json.loads(outputs["json"]["text"][0])["cells"][2]
    assert set(cell["change"]) == {"whole", "inside", "outside"}
    assert cell["kept"]["rms"] == pytest.approx(cell["change"]["outside"]["rms"])


def test_equal_images_are_reported_as_no_effect_with_a_warning(server, cells):
    outputs = server.run_prompt(grid_graph(load_names=(cells[0],) * 3))["outputs"]
    report = outputs["grid"]["qwen_edit_lora_report"][0]
    assert report.startswith("Check the LoRA first: no tested strength changes the image.")
    assert "\nno effect: all 2 images at other strengths equal strength 0 bit" in report
    assert outputs["grid"]["qwen_edit_lora_warning"] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "0\n1"}, "there are 3 images and 2 labels"),
        ({"labels": "0\n0.5\nmuch"}, "'much' is not a sweep label"),
        ({"labels": "1\n2\n3"}, "no image is labelled 'strength=0'"),
        ({"labels": " \n "}, "labels is empty"),
        ({"filename_prefix": "../../outside"}, "points outside the output folder"),
    ],
)
def test_a_wrong_input_is_a_one_sentence_error(server, cells, changes, message):
    with pytest.raises(PromptError) as caught:
        server.run_prompt(grid_graph(load_names=cells, **changes))
    first = str(caught.value).splitlines()[0]
    assert "node grid (QwenEditLoraSweepGrid)" in first
    assert message in first


def test_a_sweep_goes_straight_into_the_grid(server, demo_models):
    folder = demo_models.root / "loras"
    paths = [folder / "grid_idle.safetensors", folder / "grid_acts.safetensors"]
    make_adapter(paths[0], demo_models.dit["2509_fp32"], delta_std=1e-12)
    make_adapter(paths[1], demo_models.dit["2509_fp32"], delta_std=0.1)
    try:
        graph = sweep_graph("0, 0.5, 1")
        outputs = server.run_prompt(graph)["outputs"]
    finally:
        for path in paths:
            path.unlink()
    figures = json.loads(outputs["json"]["text"][0])
    kinds = {name: adapter["kind"] for name, adapter in figures["adapters"].items()}
    assert kinds["grid_idle"] == "no effect"
    assert kinds["grid_acts"] in ("smooth", "uneven", "collapses")
    assert len(figures["cells"]) == 2 * (1 + 2 * 2)
    assert "grid_idle: no effect: " in outputs["grid"]["qwen_edit_lora_report"][0]


def sweep_graph(strengths: str) -> dict[str, Any]:
    clip = node("CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image")
    sweep = {
        **{"model": ["unet", 0], "vae": ["vae", 0], "latent_image": ["latent", 0]},
        **{"positive": ["prompt", 0], "negative": ["prompt", 0], "strengths": strengths},
        **{"seed": 1, "seeds": "1, 2", "steps": 2, "cfg": 1.0, "sampler_name": "euler"},
        **{"scheduler": "simple", "denoise": 1.0, "loras": "grid_idle*\ngrid_acts*"},
    }
    return {
        "unet": node("UNETLoader", unet_name="tiny_fp32_2509.safetensors", weight_dtype="default"),
        "clip": clip,
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "prompt": node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="red"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sweep": node("QwenEditLoraSweep", **sweep),
        "grid": node(
            "QwenEditLoraSweepGrid",
            images=["sweep", 0],
            labels=["sweep", 2],
            filename_prefix="grid_test/swept",
        ),
        "json": node("PreviewAny", source=["grid", 5]),
    }


def test_without_metadata_the_file_holds_no_graph(comfyui_path: Path, base_directory: Path, cells):
    options = ["--disable-metadata"]
    with ComfyServer.start(
        base_directory, sys.executable, comfyui_path, extra_args=options
    ) as server:
        server.wait_ready()
        entry = server.run_prompt(grid_graph(load_names=cells))
        (saved,) = entry["outputs"]["grid"]["images"]
        assert fetch(server, saved).text == {}
