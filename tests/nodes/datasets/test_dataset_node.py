"""Image Pairs in a running ComfyUI: from photographs to a cached set ready for training."""

from __future__ import annotations

import os
import shutil
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_base.pair_folders import (
    edit,
    load_photograph,
    write_pairs,
    write_picture,
    write_text,
)
from demo_base.prompts import node
from demo_base.server import PromptError
from PIL import Image
from qwen_edit_lora.lora_core.pairs.vae_copy import find_vae
from qwen_edit_lora.lora_core.training.data.dataset import CachedDataset, read_dataset

pytestmark = pytest.mark.comfy

SMALL = 0.01  # megapixels; on a shared machine an image of the stock size takes a minute


def build_graph(**inputs: Any) -> dict[str, Any]:
    inputs = {
        "folder": "",
        "variant": "2509 / 2511",
        "megapixels": SMALL,
        "reference_megapixels": SMALL,
        "captions": "",
        **inputs,
    }
    return {
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "set": node("QwenEditDataset", clip=["clip", 0], vae=["vae", 0], **inputs),
        "table": node("PreviewAny", source=["set", 2]),
    }


def run(server: Any, graph: dict[str, Any]) -> str:
    """The node's report."""
    entry = server.run_prompt(graph, timeout=500)
    return entry["outputs"]["set"]["qwen_edit_lora_report"][0]


def fail(server: Any, graph: dict[str, Any]) -> str:
    with pytest.raises(PromptError) as caught:
        server.run_prompt(graph, timeout=500)
    message = str(caught.value)
    assert "QwenEditDataset" in message
    return message.split("Error: ", 1)[1].split("\n", 1)[0]


@pytest.fixture
def roots(base_directory: Path) -> Iterator[dict[str, Path]]:
    """Folders used only by this test, and an empty cache."""
    made = {name: base_directory / name / "test_pairs" for name in ("datasets", "input", "output")}
    cache = base_directory / "user" / "__qwen_edit_lora" / "datasets"
    yield {**made, "base": base_directory, "cache": cache}
    for folder in (*made.values(), cache):
        shutil.rmtree(folder, ignore_errors=True)


def read_set(roots: dict[str, Path], report: str) -> CachedDataset:
    line = next(line for line in report.splitlines() if line.startswith("pairs encoded"))
    return read_dataset(roots["cache"] / "sets" / line.rpartition(": ")[2])


def list_items(roots: dict[str, Path]) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (roots["cache"] / "items").glob("*.safetensors")
    }


def test_photographs_become_a_set_that_trains_a_step(server, roots, demo_models):
    from qwen_edit_lora.lora_core.injection.inject import inject
    from qwen_edit_lora.lora_core.injection.plan import LoraSettings
    from qwen_edit_lora.lora_core.training.data.batches import Slot, load_batch
    from qwen_edit_lora.lora_core.training.model.loading import load_transformer
    from qwen_edit_lora.lora_core.training.objective.objective import Objective
    from qwen_edit_lora.lora_core.training.objective.objective_config import ObjectiveConfig
    from qwen_edit_lora.lora_core.training.sampling.image_decoder import load_decoder

    write_pairs(roots["datasets"], 4)
    entry = server.run_prompt(build_graph(folder="test_pairs"), timeout=500)
    report = entry["outputs"]["set"]["qwen_edit_lora_report"][0]
    assert report.startswith("test_pairs: 4 of 4 pairs can be used\nlayout: targets in target/")
    assert "pairs encoded: 4, already cached: 0" in report
    assert entry["outputs"]["set"]["qwen_edit_lora_warning"] == [False]
    assert "photo_3" in entry["outputs"]["table"]["text"][0]
    (sheet,) = server.images(entry)
    assert sheet.startswith(b"\x89PNG")

    dataset = read_set(roots, report)
    vae = find_vae(dataset.folder)
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, file = (
            load_decoder(path, dtype=torch.float32)(latents) for path in (vae, demo_models.vae)
        )
    torch.testing.assert_close(ours, file)
    assert [info.caption for info in dataset.items] == [
        f"exchange red and blue, number {i}" for i in range(4)
    ]
    dataset.check_captions_can_drop()
    model = load_transformer(demo_models.dit["2509_fp32"], "fp32", compute_dtype=torch.float32)
    injection = inject(model.transformer, LoraSettings(rank=2), seed=1)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.01)
    batch = load_batch(dataset, (Slot(0, 0, 0),), 0)
    objective = Objective(ObjectiveConfig())
    before = objective.compute_losses(model, batch)["velocity"].mean()
    before.backward()
    optimizer.step()
    after = objective.compute_losses(model, batch)["velocity"].mean()
    assert torch.isfinite(before)
    assert after < before


def run_again_without(folder: Path, server: Any, graph: dict[str, Any]) -> str:
    """The report after the set was deleted: ComfyUI must not reuse the node's cached output."""
    shutil.rmtree(folder)
    return run(server, graph)


def test_a_changed_caption_encodes_one_pair_and_the_old_set_stays(server, roots):
    write_pairs(roots["input"], 4)
    graph = build_graph(folder="input/test_pairs")
    first = read_set(roots, run(server, graph))
    items = list_items(roots)
    assert len(items) == 4
    write_text(roots["input"] / "target" / "photo_2.txt", "something else")
    report = run(server, graph)
    assert "pairs encoded: 1, already cached: 3" in report
    now = list_items(roots)
    assert len(now) == 5
    assert {name: now[name] for name in items} == items  # none was rewritten
    second = read_set(roots, report)
    assert [info.caption for info in second.items][2] == "something else"
    assert [info.caption for info in read_dataset(first.folder).items][2].endswith("number 2")
    assert [i for i in range(4) if second.items[i].key != first.items[i].key] == [2]
    assert "pairs encoded: 0, already cached: 4" in run_again_without(second.folder, server, graph)
    changed, before = second.load(2), first.load(2)
    assert torch.equal(changed.target, before.target)
    assert torch.equal(changed.text_empty, before.text_empty)
    assert changed.text.shape != before.text.shape or not torch.equal(changed.text, before.text)


def test_everything_that_matters_is_part_of_the_key(server, roots):
    write_pairs(roots["input"], 1)
    folder = "input/test_pairs"
    seen = 0
    for change in ({}, {"megapixels": 0.02}, {"reference_megapixels": 0.02}):
        run(server, build_graph(folder=folder, **change))
        seen += 1
        assert len(list_items(roots)) == seen
    assert "pairs encoded: 0, already cached: 1" in run(
        server, build_graph(folder=folder, captions="unused")
    )
    image = Image.open(roots["input"] / "control" / "photo_0.png")
    write_picture(edit(image).rotate(180), roots["input"] / "control" / "photo_0.png")
    assert "pairs encoded: 1," in run(server, build_graph(folder=folder))
    for path in (roots["cache"] / "items").glob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()  # the sets hold links to the same file
        path.write_bytes(content[:200])
    write_text(roots["input"] / "target" / "photo_0.txt", "exchange red and blue, number 0")
    assert "pairs encoded: 1," in run(server, build_graph(folder=folder))


def test_images_of_the_graph_make_a_set(server, roots):
    for name, index in (("a", 0), ("b", 1)):
        write_picture(load_photograph(index), roots["input"] / f"{name}.png")
    graph = build_graph(captions="first\nsecond", targets=["inverted", 0], reference_1=["batch", 0])
    graph |= {
        "a": node("LoadImage", image="test_pairs/a.png"),
        "b": node("LoadImage", image="test_pairs/b.png"),
        "batch": node("ImageBatch", image1=["a", 0], image2=["b", 0]),
        "inverted": node("ImageInvert", image=["batch", 0]),
    }
    report = run(server, graph)
    assert "layout: images from the graph" in report
    dataset = read_set(roots, report)
    assert [info.caption for info in dataset.items] == ["first", "second"]
    assert not torch.equal(dataset.load(0).target, dataset.load(1).target)
    graph["set"]["inputs"]["folder"] = "input/test_pairs"
    assert "both a folder (input/test_pairs) and targets are given" in fail(server, graph)


def test_bad_input_is_a_clear_error_before_anything_is_encoded(server, roots, tmp_path):
    folder = roots["datasets"]
    graph = build_graph(folder="datasets/test_pairs")
    assert "the folder 'datasets/test_pairs' does not exist" in fail(server, graph)
    folder.mkdir(parents=True)
    assert "test_pairs holds no images; expected pairs" in fail(server, graph)
    write_picture(load_photograph(0), folder / "a.png")
    assert "test_pairs holds one image" in fail(server, graph)
    (folder / "a.png").unlink()
    write_pairs(folder, 2)
    write_picture(Image.new("1", (20_000, 64)), folder / "target" / "photo_0.png")
    assert "target/photo_0.png is 20,000 x 64 px; expected at most" in fail(server, graph)
    (folder / "target" / "photo_0.png").write_bytes(b"")
    message = fail(server, graph)
    assert "target/photo_0.png is an empty file" in message
    left = run(server, build_graph(folder="datasets/test_pairs", on_problem="leave the pair out"))
    assert "1 of 2 pairs can be used" in left
    assert "Warning: Left out: target/photo_0.png is an empty file" in left
    shutil.rmtree(roots["cache"])
    checked = run(server, build_graph(folder="datasets/test_pairs", check_only=True))
    assert "Stop: target/photo_0.png is an empty file" in checked
    assert "checked only: nothing was encoded" in checked
    assert list_items(roots) == {}


def test_folders_outside_the_roots_are_refused(server, roots, tmp_path):
    outside = write_pairs(tmp_path / "outside", 1)
    roots["input"].mkdir(parents=True)
    (roots["input"] / "link").symlink_to(outside, target_is_directory=True)
    relative = os.path.relpath(outside, roots["base"] / "input")
    for name in (str(outside), relative, f"input/{relative}", "input/test_pairs/link", "a\0b"):
        message = fail(server, build_graph(folder=name))
        assert "is outside the folders for training images" in message, name
        assert "expected a folder inside ComfyUI's datasets, input, output" in message
        assert str(roots["base"]) not in message.replace(str(outside), "")
    write_pairs(roots["output"], 1)
    shutil.rmtree(roots["output"] / "control")
    message = fail(
        server, build_graph(folder="output/test_pairs", reference_folders=str(outside / "control"))
    )
    assert "is outside the folders for training images" in message
    assert list_items(roots) == {}


def test_odd_names_and_numbers_are_short_errors_without_an_absolute_path(server, roots):
    write_pairs(roots["input"], 1)
    for name in ("a" * 300, "input/" + "é" * 5000, "input/test_pairs/" + "x" * 256, "\ud800"):
        message = fail(server, build_graph(folder=name))
        assert "does not exist" in message or "is outside the folders" in message, name[:20]
        assert len(message) <= 400
        assert message.isprintable()
        assert str(roots["base"]) not in message
    for option in ("megapixels", "reference_megapixels"):
        message = fail(server, build_graph(folder="input/test_pairs", **{option: float("nan")}))
        assert f"{option} is nan; expected a number above 0" in message
    assert list_items(roots) == {}


def test_what_is_left_out_is_reported_on_the_node_and_in_its_json(server, roots):
    folder = write_pairs(roots["input"], 2)
    write_picture(load_photograph(3), folder / "garment" / "photo_0.png")
    entry = server.run_prompt(build_graph(folder="input/test_pairs"), timeout=500)
    shown = entry["outputs"]["set"]
    report = shown["qwen_edit_lora_report"][0]
    assert "Warning: images that belong to no pair: 1, such as garment/photo_0.png" in report
    assert shown["qwen_edit_lora_warning"] == [True]
    (reported,) = shown["qwen_edit_lora_pairs"]
    (finding,) = reported["findings"]
    assert (finding["kind"], finding["severity"]) == ("pictures_unused", "warning")
    assert (reported["num_pairs"], finding["count"]) == (2, 1)
    assert str(roots["base"]) not in report
    assert "__qwen_edit_lora/datasets of the user folder" in report


def test_images_of_every_kind_are_encoded(server, roots):
    folder = write_pairs(roots["datasets"], 6, "target/🐈 {}.png", "control/🐈 {}.png", None)
    image = load_photograph(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    control = folder / "control"
    for index, suffix in ((0, "tif"), (2, "webp")):
        (control / f"🐈 photo_{index}.png").unlink()
        path = control / f"🐈 photo_{index}.{suffix}"
        if suffix == "tif":
            write_picture(image.convert("CMYK"), path)
        else:
            write_picture(image, path, save_all=True, append_images=[edit(image)])
    write_picture(deep, control / "🐈 photo_1.png")
    write_picture(turned, control / "🐈 photo_3.png", exif=exif)
    write_picture(image.convert("RGBA"), control / "🐈 photo_4.png")
    report = run(server, build_graph(folder="datasets/test_pairs", captions="swap"))
    assert "pairs encoded: 6," in report
    for trait in ("CMYK", "16-bit", "2 frames, the first is used", "turned by EXIF", "transparent"):
        assert f"is {trait}" in report
    dataset = read_set(roots, report)
    assert {info.references for info in dataset.items} == {dataset.items[5].references}


def test_a_read_only_or_full_cache_is_a_clear_error(server, roots):
    write_pairs(roots["input"], 1)
    roots["cache"].parent.mkdir(parents=True, exist_ok=True)
    roots["cache"].write_bytes(b"in the way")
    try:
        message = fail(server, build_graph(folder="input/test_pairs"))
    finally:
        roots["cache"].unlink()
    assert "the cache folder" in message
    assert "cannot be written" in message


def test_an_interrupted_run_keeps_the_pairs_it_finished(server, roots):
    write_pairs(roots["input"], 16)
    graph = build_graph(folder="input/test_pairs")
    prompt = server.queue_prompt(graph)
    deadline = time.monotonic() + 300
    while len(list_items(roots)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.post("/interrupt")
    at_interrupt = len(list_items(roots))
    with pytest.raises((PromptError, urllib.error.HTTPError)):
        server.wait_for_prompt(prompt, timeout=300)
    kept = list_items(roots)
    assert 2 <= len(kept) <= at_interrupt + 2
    assert len(kept) < 16
    assert not list((roots["cache"] / "items").glob(".*"))
    report = run(server, graph)
    assert f"pairs encoded: {16 - len(kept)}, already cached: {len(kept)}" in report
    assert {name: list_items(roots)[name] for name in kept} == kept
