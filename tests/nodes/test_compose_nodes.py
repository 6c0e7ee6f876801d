"""Compare, Resize, Merge and Extract in a running server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_base.adapters import make_adapter
from demo_base.prompts import node
from demo_base.server import PromptError
from PIL import Image
from qwen_edit_lora.lora_core import Adapter, compute_delta, read_adapter
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

RANK = 8
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def models(demo_models: Any) -> Iterator[Path]:
    """The server's models folder; files a test adds are removed after it."""
    before = set(demo_models.root.rglob("*"))
    yield demo_models.root
    for path in set(demo_models.root.rglob("*")) - before:
        path.unlink()


@pytest.fixture
def loras(models: Path, demo_models: Any) -> dict[str, Path]:
    """Two LoRAs: b is a with every lora_B turned to its negative and doubled."""
    a, b = models / "loras" / "a.safetensors", models / "loras" / "b.safetensors"
    make_adapter(a, demo_models.dit["2509_fp32"], rank=RANK, dtype=torch.float32)
    save_file({k: -2 * t if "lora_B" in k else t for k, t in load_file(a).items()}, b)
    return {"a": a, "b": b}


def load_nodes() -> dict[str, Any]:
    return {name: node("QwenEditLoraLoad", lora_name=f"{name}.safetensors") for name in "ab"}


@pytest.fixture
def compose(server: Any, base_directory: Path) -> Callable[..., tuple[Adapter, str]]:
    """Runs one toolbox node; returns its adapter, through Save, and its report."""

    def run(class_type: str, **inputs: Any) -> tuple[Adapter, str]:
        graph = {
            **load_nodes(),
            "node": node(class_type, **inputs),
            "save": node("QwenEditLoraSave", adapter=["node", 0], filename_prefix="loras/made"),
            "name": node("PreviewAny", source=["save", 0]),
        }
        outputs = server.run_prompt(graph)["outputs"]
        path = base_directory / "output" / outputs["name"]["text"][0]
        return read_adapter(path), outputs["node"]["qwen_edit_lora_report"][0]

    return run


def get_delta(adapter: Adapter | Path, path: str = TO_Q) -> torch.Tensor:
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    return compute_delta(adapter.modules[path])


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_compare_detects_opposed_adapters(server, loras):
    graph = {
        **load_nodes(),
        "compare": node("QwenEditLoraCompare", adapter_a=["a", 0], adapter_b=["b", 0]),
        "json": node("PreviewAny", source=["compare", 1]),
        "report": node("PreviewAny", source=["compare", 0]),
    }
    entry = server.run_prompt(graph)
    shown = entry["outputs"]["compare"]["qwen_edit_lora_report"][0]
    advice, *rest = shown.splitlines()
    assert advice.startswith("Do not stack them at full strength: 100 % of the weaker one is")
    assert rest[0] == "a: a.safetensors; b: b.safetensors"
    assert rest[1].startswith("24 modules compared, 0 only in a")
    assert entry["outputs"]["compare"]["qwen_edit_lora_num_shown"] == [2]
    assert "cosine -1;" in shown
    assert "24 modules, lowest cosine first" in entry["outputs"]["report"]["text"][0]
    figures = json.loads(entry["outputs"]["json"]["text"][0])
    assert figures["norm_ratio"] == pytest.approx(2.0)
    opposed = read_picture(server, entry)
    graph["compare"]["inputs"]["adapter_b"] = ["a", 0]
    same = read_picture(server, server.run_prompt(graph))
    assert opposed.shape == (1024, 1024, 3)
    assert (opposed != same).any()


def read_picture(server: Any, entry: dict[str, Any]) -> np.ndarray:
    (picture,) = server.images({"outputs": {"compare": entry["outputs"]["compare"]}})
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def test_resize_keeps_the_energy_its_report_states(compose, loras):
    resized, report = compose("QwenEditLoraResize", adapter=["a", 0], rank=3)
    assert {weights.rank for weights in resized.modules.values()} == {3}
    kept = sum(get_delta(resized, path).square().sum().item() for path in resized)
    whole = read_adapter(loras["a"])
    total = sum(get_delta(whole, path).square().sum().item() for path in whole)
    (said,) = [line for line in report.splitlines() if "of the energy kept" in line]
    assert float(said.split("%")[0]) / 100 == pytest.approx(kept / total, abs=1e-3)
    assert 0.3 < kept / total < 0.9


def test_resize_by_energy_alone_and_the_rank_as_its_limit(compose, loras):
    free, _ = compose("QwenEditLoraResize", adapter=["a", 0], rank=0, energy=0.9)
    limited, _ = compose("QwenEditLoraResize", adapter=["a", 0], rank=4, energy=0.9)
    assert {w.rank for w in free.modules.values()} <= set(range(5, RANK + 1))
    assert {w.rank for w in limited.modules.values()} == {4}
    lossless, report = compose("QwenEditLoraResize", adapter=["a", 0], rank=0, energy=1.0)
    assert "100 % of the energy kept" in report
    assert measure_error(get_delta(lossless), get_delta(loras["a"])) < 1e-5


def test_merge_adds_up_and_its_rank_is_kept(compose, loras):
    inputs = {"adapters.adapter_0": ["a", 0], "adapters.adapter_1": ["b", 0]}
    merged, report = compose("QwenEditLoraMerge", strengths="0.5, -0.25", **inputs)
    assert measure_error(get_delta(merged), get_delta(loras["a"])) < 1e-5  # 0.5 - 0.25 * -2
    assert "of the energy kept" in report
    assert {w.rank for w in merged.modules.values()} == {2 * RANK}
    small, _ = compose("QwenEditLoraMerge", strengths="0.5, -0.25", rank=RANK, **inputs)
    assert {w.rank for w in small.modules.values()} == {RANK}
    assert measure_error(get_delta(small), get_delta(loras["a"])) < 1e-5
    with pytest.raises(PromptError, match="strengths holds 3 numbers for 2 adapters"):
        compose("QwenEditLoraMerge", strengths="1, 1, 1", **inputs)
    with pytest.raises(PromptError, match="there is nothing to merge"):
        compose("QwenEditLoraMerge", strengths="0", **inputs)


def test_extract_recovers_the_merged_lora_and_notices_a_changed_file(
    compose, loras, models, demo_models
):
    base = demo_models.dit["2509_fp32"]
    tuned = models / "diffusion_models" / "tuned.safetensors"
    adapter = read_adapter(loras["a"])
    for strength in (1.0, -3.0):
        tensors = load_file(base)
        prefix = next(key for key in tensors if key.endswith(f"{TO_Q}.weight"))[: -len(TO_Q) - 7]
        for path in adapter:
            tensors[f"{prefix}{path}.weight"] += strength * get_delta(adapter, path)
        save_file(tensors, tuned)
        names = {"base_name": base.name, "tuned_name": tuned.name}
        extracted, report = compose("QwenEditLoraExtract", rank=RANK, **names)
        assert set(extracted) == set(adapter)
        assert measure_error(get_delta(extracted), strength * get_delta(adapter)) < 1e-3
        assert "Linears that do not differ" in report
    names["tuned_name"] = base.name
    with pytest.raises(PromptError, match="hold the same weights in all"):
        compose("QwenEditLoraExtract", rank=RANK, **names)
    names["tuned_name"] = "../loras/a.safetensors"
    with pytest.raises(PromptError, match="Value not in list"):
        compose("QwenEditLoraExtract", rank=RANK, **names)
