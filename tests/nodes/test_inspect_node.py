"""Inspect Qwen Edit LoRA in a running server, and its caches, in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from demo_base.adapters import make_adapter
from demo_base.prompts import node
from demo_base.server import PromptError
from PIL import Image
from qwen_edit_lora.lora_core import read_adapter
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

LORA = "inspected.safetensors"


def inspect_graph(lora_name: str = LORA, **options: Any) -> dict[str, Any]:
    """Every output of Inspect is connected to a node that shows it."""
    graph = {
        "load": node("QwenEditLoraLoad", lora_name=lora_name),
        "inspect": node("QwenEditLoraInspect", adapter=["load", 0], **options),
        "report": node("PreviewAny", source=["inspect", 0]),
        "json": node("PreviewAny", source=["inspect", 1]),
    }
    for number, name in enumerate(("heat_map", "histogram", "spectrum"), start=2):
        graph[name] = node("SaveImage", images=["inspect", number], filename_prefix=name)
    return graph


@pytest.fixture
def lora(demo_models: Any) -> Iterator[Path]:
    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=3e-4)
    yield path
    path.unlink()


@pytest.fixture
def cache(base_directory: Path) -> Iterator[Path]:
    """The folder of cached inspections, empty before and after."""
    folder = base_directory / "user" / "__qwen_edit_lora" / "inspections"
    for path in folder.glob("*"):
        path.unlink()
    yield folder
    for path in folder.glob("*"):
        path.unlink()


def read_pixels(server: Any, entry: dict[str, Any], name: str) -> np.ndarray:
    (image,) = entry["outputs"][name]["images"]
    query = {key: image[key] for key in ("filename", "subfolder", "type")}
    return np.asarray(Image.open(io.BytesIO(server.request("/view", query))).convert("RGB"))


def test_the_node_gives_a_verdict_a_table_json_and_three_images(server, lora, cache):
    entry = server.run_prompt(inspect_graph(exact=True))
    outputs = entry["outputs"]
    shown = outputs["inspect"]["qwen_edit_lora_report"][0]
    advice, *rest = shown.splitlines()
    assert advice.startswith("Use strength 1: the delta is as large as that of known-good LoRAs")
    assert rest[0] == f"{LORA}: 24 modules"
    assert rest[1].startswith("dense, small, healthy: std ")
    assert outputs["inspect"]["qwen_edit_lora_num_shown"] == [2]
    assert outputs["inspect"]["qwen_edit_lora_warning"] == [False]
    (report,) = outputs["report"]["text"]
    assert report.startswith(shown)
    assert "24 modules, smallest std first" in report
    assert len(report.splitlines()) == len(shown.splitlines()) + 1 + 2 + 24
    figures = json.loads(outputs["json"]["text"][0])
    assert figures["verdict"][-1] in shown
    assert len(figures["modules"]) == 24
    pictures = [read_pixels(server, entry, n) for n in ("heat_map", "histogram", "spectrum")]
    for picture in pictures:
        assert picture.shape == (1024, 1024, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert (pictures[0] == read_pixels(server, entry, "inspect")).all()  # on the node itself
    assert len(list(cache.iterdir())) == 1


def test_without_exact_the_histogram_says_so_and_a_sort_key_that_needs_it_is_an_error(
    server, lora, cache
):
    graph = inspect_graph(statistic="effective rank", sort_by="block")
    entry = server.run_prompt(graph)
    assert "in the model's order" in entry["outputs"]["report"]["text"][0]
    exact = server.run_prompt(inspect_graph(exact=True))
    histograms = [read_pixels(server, e, "histogram") for e in (entry, exact)]
    assert (histograms[0] != histograms[1]).any()
    with pytest.raises(PromptError, match="needs every entry, but this inspection left them out"):
        server.run_prompt(inspect_graph(sort_by="abs max") | {"load": graph["load"]})


def test_an_untrained_file_and_a_broken_one_are_distinguished(server, lora, cache):
    tensors = load_file(lora)
    zero = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(zero, lora)
    shown = server.run_prompt(inspect_graph())["outputs"]["inspect"]
    assert (
        "untrained: the delta of all 24 modules is exactly 0" in shown["qwen_edit_lora_report"][0]
    )
    assert shown["qwen_edit_lora_warning"] == [True]
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, lora)
    shown = server.run_prompt(inspect_graph())["outputs"]["inspect"]
    assert "non-finite: NaN or Inf in 1 module" in shown["qwen_edit_lora_report"][0]


def test_a_wrong_input_is_a_one_sentence_error(server):
    graph = inspect_graph()
    graph["load"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    with pytest.raises(PromptError, match="Return type mismatch"):
        server.run_prompt(graph)


# --- caches --------------------------------------------------------------------------------------


@pytest.fixture
def inspections(comfyui: SimpleNamespace, cache: Path) -> Any:
    from qwen_edit_lora.nodes import inspections

    return inspections


@pytest.fixture
def calls(inspections: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`exact` of every inspection that is actually computed."""
    calls: list[bool] = []
    original = inspections.inspect_adapter

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["exact"])
        return original(*args, **kwargs)

    monkeypatch.setattr(inspections, "inspect_adapter", count)
    return calls


def test_a_second_inspection_costs_nothing_even_after_a_restart(
    inspections, calls, make_lora: Callable[..., Path], cache
):
    path = make_lora("a")
    adapter = read_adapter(path)
    first = inspections.get_inspection(adapter, exact=False)
    assert inspections.get_inspection(adapter, exact=False) is first
    assert inspections.get_inspection(read_adapter(path), exact=False) == first  # from disk
    assert calls == [False]
    exact = inspections.get_inspection(adapter, exact=True)
    assert exact.is_exact
    # An exact one serves both requests, from memory and from disk.
    for old in cache.glob("*[!t].json"):
        old.unlink()
    assert inspections.get_inspection(read_adapter(path), exact=False) == exact
    assert inspections.get_inspection(read_adapter(path), exact=True) == exact
    assert calls == [False, True]


def test_new_content_under_the_same_name_is_inspected_again(inspections, calls, make_lora):
    inspections.get_inspection(read_adapter(make_lora("a", delta_std=1e-4)), exact=False)
    inspections.get_inspection(read_adapter(make_lora("a", delta_std=2e-4)), exact=False)
    assert calls == [False, False]


def test_an_interrupted_inspection_leaves_nothing_behind(
    inspections, calls, comfyui, make_lora, cache, monkeypatch
):
    management = comfyui.model_management
    reported = []

    def interrupt_at_the_third(done: int, total: int) -> None:
        reported.append(done)
        if done == 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(inspections.host.progress, "build_progress", lambda: interrupt_at_the_third)
    adapter = read_adapter(make_lora("a"))
    with pytest.raises(management.InterruptProcessingException):
        inspections.get_inspection(adapter, exact=True)
    assert reported == [0, 1, 2]
    assert not management.processing_interrupted()  # the next prompt runs
    assert list(cache.glob("*")) == []
    monkeypatch.undo()
    assert inspections.get_inspection(adapter, exact=True).is_exact


def test_the_progress_bar_follows_the_modules(inspections, comfyui, make_lora, monkeypatch):
    reported = []
    monkeypatch.setattr(
        comfyui.utils,
        "PROGRESS_BAR_HOOK",
        lambda done, total, *_, **__: reported.append((done, total)),
    )
    inspections.get_inspection(read_adapter(make_lora("a")), exact=False)
    assert reported[0] == (0, 24)
    assert reported[-1] == (24, 24)


def test_a_full_cache_drops_the_oldest_and_a_read_only_one_is_ignored(
    inspections, make_lora, cache, monkeypatch, caplog
):
    monkeypatch.setattr(inspections, "MAX_FILES", 2)
    for std in (1e-4, 2e-4, 3e-4):
        inspections.get_inspection(read_adapter(make_lora("a", delta_std=std)), exact=False)
    assert len(list(cache.glob("*"))) == 2

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inspections, "write_inspection", refuse)
    found = inspections.get_inspection(read_adapter(make_lora("a", delta_std=4e-4)), exact=False)
    assert len(found.modules) == 24
    assert "could not be cached: [Errno 13] Permission denied" in caplog.text


def test_a_base_models_file_adds_what_a_merge_would_leave(server):
    inputs = {"adapter": ["load", 0], "base_model": "qwen_image_edit_2509_fp8_e4m3fn.safetensors"}
    graph = {
        "load": node("QwenEditLoraLoad", lora_name="my_edit_lora.safetensors"),
        "inspect": node("QwenEditLoraInspect", **inputs),
    }
    entry = server.run_prompt(graph)
    report = entry["outputs"]["inspect"]["qwen_edit_lora_report"][0]
    assert "into this float8_e4m3fn base" in report
    assert "by real rounding in 20 modules" in report


# --- beside a base --------------------------------------------------------------------------------

FP8_BASE = "qwen_image_edit_2509_fp8_e4m3fn.safetensors"
SCALED_BASE = "qwen_image_edit_2511_fp8_scaled.safetensors"


def inspect_beside_model(base: str, lora_name: str = "my_edit_lora.safetensors") -> dict[str, Any]:
    return {
        "load": node("QwenEditLoraLoad", lora_name=lora_name),
        "model": node("UNETLoader", unet_name=base, weight_dtype="fp8_e4m3fn"),
        "inspect": node("QwenEditLoraInspect", adapter=["load", 0], model=["model", 0]),
        "json": node("PreviewAny", source=["inspect", 1]),
    }


def read_inspection_json(entry: dict[str, Any]) -> dict[str, Any]:
    return json.loads(entry["outputs"]["json"]["text"][0])


@pytest.mark.parametrize(
    ("base", "storage"),
    [(FP8_BASE, "float8_e4m3fn"), (SCALED_BASE, "scaled float8_e4m3fn")],
)
def test_a_loaded_model_gives_the_same_statistics_as_its_file(server, base, storage, cache):
    graph = inspect_beside_model(base)
    from_model = read_inspection_json(server.run_prompt(graph))
    graph["inspect"] = node("QwenEditLoraInspect", adapter=["load", 0], base_model=base)
    from_file = read_inspection_json(server.run_prompt(graph))
    assert from_model["merge_error"] > 0.01  # a large delta; the tiny base's LoRA is no faint one
    assert {m["base"]["storage"] for m in from_model["modules"].values()} == {storage}
    assert from_model == from_file


def test_previously_merged_loras_are_not_part_of_the_base(server, cache):
    graph = inspect_beside_model(SCALED_BASE)
    plain = read_inspection_json(server.run_prompt(graph))
    graph["merged"] = node(
        "LoraLoaderModelOnly",
        model=["model", 0],
        lora_name="my_edit_lora.safetensors",
        strength_model=2.0,
    )
    graph["inspect"]["inputs"]["model"] = ["merged", 0]
    assert read_inspection_json(server.run_prompt(graph)) == plain


def test_two_bases_at_once_are_refused(server):
    graph = inspect_beside_model(FP8_BASE)
    graph["inspect"]["inputs"]["base_model"] = SCALED_BASE
    with pytest.raises(PromptError, match=r"both a model and base_model .* disconnect the model"):
        server.run_prompt(graph)


def test_modules_missing_from_the_base_are_counted_in_the_report(server, lora, cache):
    tensors = load_file(lora)
    key = next(key for key in tensors if "lora_B" in key)
    stem = key.partition(".lora_")[0]
    for name in [name for name in tensors if name.startswith(f"{stem}.")]:
        moved = name.replace("transformer_blocks.0.", "transformer_blocks.55.")
        tensors[moved] = tensors.pop(name)
    save_file(tensors, lora)
    entry = server.run_prompt(inspect_beside_model(FP8_BASE, LORA))
    (report,) = entry["outputs"]["inspect"]["qwen_edit_lora_report"]
    assert "Warning: 1 module without statistics: transformer_blocks.55." in report
    assert "has no such module" in report
    assert entry["outputs"]["inspect"]["qwen_edit_lora_warning"] == [True]


def test_a_bf16_model_that_fits_raises_no_warning(server, lora, cache):
    graph = inspect_beside_model("qwen_image_edit_2509_bf16.safetensors", LORA)
    graph["model"]["inputs"]["weight_dtype"] = "default"
    entry = server.run_prompt(graph)
    assert entry["outputs"]["inspect"]["qwen_edit_lora_warning"] == [False]


def test_an_inspection_beside_a_base_file_is_kept_until_the_file_changes(
    inspections, calls, make_lora, cache, demo_models, tmp_path
):
    base = tmp_path / "base.safetensors"
    base.write_bytes(demo_models.dit["2509_bf16"].read_bytes())
    path = make_lora("a")
    first = inspections.get_inspection(read_adapter(path), exact=False, base=base)
    again = inspections.get_inspection(read_adapter(path), exact=False, base=base)  # from disk
    assert again == first
    assert next(iter(again.modules.values())).base is not None
    assert calls == [False]
    assert inspections.get_inspection(read_adapter(path), exact=False) != first  # without a base
    tensors = load_file(base)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, base)
    other = inspections.get_inspection(read_adapter(path), exact=False, base=base)
    assert other.base_ratio == pytest.approx(first.base_ratio / 2, rel=0.01)
    assert calls == [False, False, False]


def test_a_models_inspection_is_cached_only_in_memory_while_both_live(
    inspections, calls, make_lora, cache, load_base
):
    import gc

    adapter, model = read_adapter(make_lora("a")), load_base("2509_bf16")
    first = inspections.get_inspection(adapter, exact=False, base=model)
    assert inspections.get_inspection(adapter, exact=False, base=model.clone()) is first
    assert calls == [False]
    assert list(cache.glob("*")) == []
    assert len(inspections._beside[adapter]) == 1
    del model
    gc.collect()
    assert len(inspections._beside[adapter]) == 0


def test_a_model_that_holds_a_merged_lora_gives_its_original_weights(
    inspections, comfyui, make_lora, load_base, apply_native
):
    from qwen_edit_lora.nodes.model_base import read_model_base

    path = "transformer_blocks.0.attn.to_q"
    for name in ("2509_bf16", "2511_fp8_scaled"):
        model = load_base(name)
        before = read_model_base(model).get(path).values
        merged = apply_native(model, make_lora("a"), 5.0)
        with torch.inference_mode():
            comfyui.model_management.load_models_gpu([merged])
            for patched in list(merged.patches):
                merged.patch_weight_to_device(patched)
        held = model.model.diffusion_model.get_submodule(path).weight
        held = held.dequantize() if hasattr(held, "_qdata") else held
        assert not torch.allclose(held.float(), before, atol=1e-3)
        assert torch.equal(read_model_base(merged).get(path).values, before)
        assert torch.equal(read_model_base(model).get(path).values, before)
        comfyui.model_management.unload_all_models()


def test_a_model_of_another_kind_is_a_one_sentence_error(inspections, comfyui, make_lora):
    from qwen_edit_lora.lora_core import KeyFormatError
    from qwen_edit_lora.nodes.model_base import read_model_base

    other = torch.nn.Module()
    other.diffusion_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = comfyui.model_patcher.ModelPatcher(other, torch.device("cpu"), torch.device("cpu"))
    sentence = r"the connected MODEL \(Module\) is not a Qwen-Image model: none of its 2 keys"
    with pytest.raises(KeyFormatError, match=sentence):
        read_model_base(model)
    with pytest.raises(KeyFormatError, match=sentence):
        inspections.get_inspection(read_adapter(make_lora("a")), exact=False, base=model)


def test_an_interrupted_inspection_beside_a_base_leaves_nothing_behind(
    inspections, calls, comfyui, make_lora, cache, monkeypatch, demo_models
):
    management = comfyui.model_management

    def interrupt_at_the_third(done: int, total: int) -> None:
        if done == 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(inspections.host.progress, "build_progress", lambda: interrupt_at_the_third)
    adapter, base = read_adapter(make_lora("a")), demo_models.dit["2509_bf16"]
    with pytest.raises(management.InterruptProcessingException):
        inspections.get_inspection(adapter, exact=False, base=base)
    assert list(cache.glob("*")) == []
    monkeypatch.undo()
    assert inspections.get_inspection(adapter, exact=False, base=base).merge_error is not None
