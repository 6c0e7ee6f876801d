"""Merging into the weights: the kinds whose delta depends on them, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from demo_base.dit import WIDTH
from qwen_edit_lora.lora_core import (
    Adapter,
    DoraWeights,
    FileError,
    LoraWeights,
    OftWeights,
    compute_delta,
    read_adapter,
)
from safetensors.torch import save_file

from ..conftest import worst

pytestmark = pytest.mark.comfy

PATH = "transformer_blocks.0.attn.to_q"
ROUNDING = 1e-5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def build(kind: str) -> Adapter:
    direction = LoraWeights(draw(4, WIDTH), draw(WIDTH, 4, seed=1), 2.0)
    weights = {
        "DoRA by rows": DoraWeights(direction, draw(WIDTH, 1, seed=2).abs() + 0.5),
        "DoRA by columns": DoraWeights(direction, draw(1, WIDTH, seed=2).abs() + 0.5),
        "OFT": OftWeights(draw(WIDTH // 8, 8, 8), draw(WIDTH, 1, seed=3) + 1, 1.5),
    }[kind]
    return Adapter({PATH: weights}, name=kind)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("kind", ["DoRA by rows", "DoRA by columns", "OFT"])
def test_a_merged_weight_is_base_plus_strength_times_delta(
    kind, strength, comfyui, base, apply_ours
):
    linear = base.model.diffusion_model.get_submodule(PATH)
    base_weight = linear.weight.detach().clone()
    adapter = build(kind)
    model = apply_ours(base, adapter, strength)
    with torch.inference_mode():
        comfyui.model_management.load_models_gpu([model])
        merged = linear.weight.detach().clone()
        comfyui.model_management.load_models_gpu([base])
    expected = base_weight + strength * compute_delta(adapter.modules[PATH], base_weight)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(linear.weight, base_weight)


@pytest.fixture
def compile_model(comfyui):
    """Compiles like ComfyUI's TorchCompileModel node, with a backend that only traces."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compile_model(model):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = model.clone()
        set_torch_compile_wrapper(compiled, backend="eager")
        return compiled

    return compile_model


def test_auto_merges_on_a_compiled_model(ours, base, sample, make_lora, apply_ours, compile_model):
    compiled = compile_model(base)
    adapter = read_adapter(make_lora("a"))
    model = apply_ours(compiled, adapter, 0.7)
    assert ours.side_path.get_side_path(model) is None
    assert len(model.patches) == len(adapter)


def test_torch_compile_after_apply_samples_on_merged_weights(
    base, sample, make_lora, apply_native, apply_ours, compile_model, caplog
):
    path = make_lora("a")
    before, expected = sample(base), sample(apply_native(base, path, 0.7))
    compiled = compile_model(apply_ours(base, path, 0.7))
    assert worst(sample(compiled), expected) < ROUNDING
    assert "torch.compile is on this MODEL, so the LoRA is merged" in caplog.text
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(sample(compiled), sample(compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert torch.equal(sample(base), before)


def write_kind(path, kind: str, seed: int) -> None:
    """A file of one module, always of the same size."""
    prefix = f"diffusion_model.{PATH}"
    pieces = {
        "LoRA": {"lora_A.weight": draw(4, WIDTH, seed=seed), "lora_B.weight": draw(WIDTH, 4)},
        "LoKr": {"lokr_w1": draw(4, 4, seed=seed), "lokr_w2": draw(WIDTH // 4, WIDTH // 4)},
        "diff": {"diff": draw(WIDTH, WIDTH, seed=seed), "diff_b": draw(WIDTH, seed=seed)},
    }[kind]
    save_file({f"{prefix}.{name}": tensor for name, tensor in pieces.items()}, path)


def overwrite(path, data: bytes) -> None:
    """Overwrites in place, visible through memory maps of the file."""
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "diff"])
def test_a_merged_file_overwritten_between_two_samplings_is_reported(
    kind, comfyui, base, sample, apply_ours, tmp_path
):
    path, other = tmp_path / "held.safetensors", tmp_path / "other.safetensors"
    write_kind(path, kind, seed=5)
    write_kind(other, kind, seed=6)
    before = sample(base)
    model = apply_ours(base, path, 1.0, mode="merge")
    first = sample(model)
    assert worst(first, before) > 1e-3
    comfyui.model_management.unload_all_models()
    assert torch.equal(sample(model), first)
    comfyui.model_management.unload_all_models()
    overwrite(path, other.read_bytes())
    with pytest.raises(FileError, match=r"held\.safetensors was overwritten on disk while this"):
        sample(model)
    assert torch.equal(sample(base), before)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["deleted", "replaced"])
def test_a_merged_file_that_is_deleted_or_replaced_stays_readable(
    is_replaced, comfyui, base, sample, apply_ours, tmp_path
):
    path, other = tmp_path / "held.safetensors", tmp_path / "other.safetensors"
    write_kind(path, "LoRA", seed=5)
    write_kind(other, "LoRA", seed=6)
    model = apply_ours(base, path, 1.0, mode="merge")
    first = sample(model)
    comfyui.model_management.unload_all_models()
    if is_replaced:
        other.replace(path)
    else:
        path.unlink()
    assert torch.equal(sample(model), first)


@pytest.mark.parametrize("kind", ["LoRA", "diff"])
def test_a_merged_file_is_bit_identical_to_the_native_loader(
    kind, base, sample, apply_native, apply_ours, tmp_path
):
    path = tmp_path / "held.safetensors"
    write_kind(path, kind, seed=5)
    native = sample(apply_native(base, path, 0.7))
    assert torch.equal(sample(apply_ours(base, path, 0.7, mode="merge")), native)
