"""A LoRA extracted from a tuned model, applied by ComfyUI's own loader, recovers the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.prompts import node
from demo_base.server import PromptError
from qwen_edit_lora.lora_core import extract_adapter, read_adapter, write_adapter
from safetensors.torch import load_file, save_file

from .conftest import worst

pytestmark = pytest.mark.comfy

NORM = "transformer_blocks.0.attn.norm_q.weight"
BIAS = "transformer_blocks.0.attn.to_q.bias"
RANK = 3


def make_tuned(base: Path, path: Path) -> Path:
    """Changes every block Linear by a delta of rank 3 and in its bias, and one norm."""
    tensors = load_file(base)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for key, tensor in tensors.items():
        if not key.split("model.diffusion_model.")[-1].startswith("transformer_blocks."):
            continue
        if tensor.ndim == 2:
            up, down = draw(len(tensor), RANK), draw(RANK, tensor.shape[1])
            tensors[key] = tensor + 0.3 * tensor.std() / RANK**0.5 * (up @ down)
        elif key.endswith(".bias") or key.endswith(NORM):
            tensors[key] = tensor + 0.3 * draw(len(tensor))
    save_file(tensors, path)
    return path


@pytest.fixture
def tuned(demo_models: Any, tmp_path: Path) -> Path:
    return make_tuned(demo_models.dit["2509_fp32"], tmp_path / "tuned.safetensors")


def test_the_extracted_lora_gives_the_tuned_model_in_comfyui(
    demo_models, tuned, comfyui, load_base, sample, apply_native, apply_ours, tmp_path
):
    base = demo_models.dit["2509_fp32"]
    with torch.inference_mode():
        expected = sample(comfyui.sd.load_diffusion_model(str(tuned), {}))
    before = sample(load_base("2509_fp32"))
    files = {}
    for biases in (True, False):
        found = extract_adapter(base, tuned, RANK, biases=biases)
        assert found.total_retained == pytest.approx(1.0, abs=1e-6)
        files[biases] = write_adapter(found.adapter, tmp_path / f"{biases}.safetensors")
    assert {BIAS.removesuffix(".bias"), NORM.removesuffix(".weight")} <= set(
        read_adapter(files[True])
    )
    native = sample(apply_native(load_base("2509_fp32"), files[True], 1.0))
    ours = sample(apply_ours(load_base("2509_fp32"), files[True], 1.0))
    without = sample(apply_native(load_base("2509_fp32"), files[False], 1.0))
    assert worst(before, expected) > 0.05
    assert worst(native, expected) < 2e-3 * worst(before, expected)
    assert worst(ours, expected) < 2e-3 * worst(before, expected)
    assert worst(without, expected) > 0.05 * worst(before, expected)  # the biases do matter


def test_the_node_extracts_biases_or_skips_and_reports_them(server, demo_models):
    base = demo_models.dit["2509_fp32"]
    tuned = make_tuned(base, demo_models.root / "diffusion_models" / "tuned_bias.safetensors")
    try:
        graph = {
            "extract": node(
                "QwenEditLoraExtract", base_name=base.name, tuned_name=tuned.name, rank=RANK
            ),
            "show": node("PreviewAny", source=["extract", 1]),
        }
        (report,) = server.run_prompt(graph)["outputs"]["extract"]["qwen_edit_lora_report"]
        assert "biases and 1 norm included" in report
        graph["extract"]["inputs"] |= {"biases": False, "device": "cpu"}
        (report,) = server.run_prompt(graph)["outputs"]["extract"]["qwen_edit_lora_report"]
        assert "differ; included" not in report
        graph["extract"]["inputs"]["device"] = "toaster"
        with pytest.raises(PromptError, match="Value not in list"):
            server.run_prompt(graph)
    finally:
        tuned.unlink()


def test_an_interrupted_extraction_stops_between_two_layers(
    comfyui, ours, demo_models, tuned, monkeypatch
):
    management, reported = comfyui.model_management, []

    def interrupt_at_the_third(done: int, total: int) -> None:
        reported.append(done)
        if done == 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(ours.host.progress, "build_progress", lambda: interrupt_at_the_third)
    with pytest.raises(management.InterruptProcessingException):
        ours.host.run_with_progress(
            extract_adapter, demo_models.dit["2509_fp32"], tuned, RANK, device="cpu"
        )
    assert reported == [0, 1, 2]
    assert ours.host.choose_compute_device("cpu") == torch.device("cpu")
    assert ours.host.choose_compute_device("auto") == management.get_torch_device()
