"""Every spelling of a 2.1 LoRA on every layout: the same image as ComfyUI's own patches.

ComfyUI reads some spellings whole, some in part and some not at all, and which ones depends on its
version and on the layout of the base. Ours reads all; where ComfyUI's reader takes all of a file,
its patches are the reference, and everywhere those of one spelling that it reads on a split base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base import dit_21
from qwen_edit_lora.lora_core import read_adapter
from safetensors.torch import save_file

from ..conftest import worst
from .test_apply import LINEARS, ROUNDING, draw

pytestmark = pytest.mark.comfy

RANK = 4
GATE, PROJ, GATE_UP = "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.gate_up"


def draw_factors(layout: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> lora_A and lora_B; of both layouts the same delta, as if trained fused."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, (path, (out, columns)) in enumerate(LINEARS.items()):
        factors[path] = draw(RANK, columns, seed=index), draw(out, RANK, seed=1000 + index)
        if path.endswith(PROJ):  # behind its gate_layer
            gate = path.replace(PROJ, GATE)
            shared, up = factors[gate][0], factors[path][1]
            factors[path] = shared, up
            if layout == "fused":
                stacked = torch.cat([factors.pop(gate)[1], factors.pop(path)[1]])
                factors[path.replace(PROJ, GATE_UP)] = shared, stacked
    return factors


def spell_peft(prefix: str, adapter: str = "") -> Callable[[str], tuple[str, str]]:
    return lambda path: (
        f"{prefix}{path}.lora_A{adapter}.weight",
        f"{prefix}{path}.lora_B{adapter}.weight",
    )


def spell_underscored(prefix: str) -> Callable[[str], tuple[str, str]]:
    def spell(path: str) -> tuple[str, str]:
        stem = prefix + path.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"

    return spell


SPELLINGS: dict[str, Callable[[str], tuple[str, str]]] = {
    "bare": spell_peft(""),
    "DiffSynth": spell_peft("", ".default"),
    "transformer": spell_peft("transformer."),
    "diffusion_model": spell_peft("diffusion_model."),
    "twice": spell_peft("diffusion_model.transformer."),
    "PEFT": spell_peft("base_model.model."),
    "musubi": spell_underscored("lora_unet_"),
    "lycoris": spell_underscored("lycoris_"),
    "lora_transformer": spell_underscored("lora_transformer_"),
    "PAI": lambda path: (f"{path}.lora_down", f"{path}.lora_up"),
}


def write_spelled(path: Path, spelling: str, layout: str) -> Path:
    tensors = {}
    for module_path, (down, up) in draw_factors(layout).items():
        down_key, up_key = SPELLINGS[spelling](module_path)
        tensors |= {down_key: down.clone(), up_key: up.clone()}
        if up_key.endswith(".lora_up.weight"):
            stem = up_key.removesuffix(".lora_up.weight")
            tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
    return path


def list_patched(model: Any) -> set[tuple[str, Any]]:
    """The rows that patches change: (key, offset); of a whole fused weight as both halves."""
    found = set()
    for key, patches in model.patches.items():
        rows = model.get_model_object(key).shape[0] // 2
        for patch in patches:
            if key.endswith(f"{GATE_UP}.weight") and patch[3] is None:
                found |= {(key, (0, 0, rows)), (key, (0, rows, rows))}
            else:
                found.add((key, patch[3]))
    return found


@pytest.fixture
def reference(load_21, sample_21, apply_native, tmp_path) -> torch.Tensor:
    """ComfyUI's own patches on a split base, of a spelling that all its versions read whole."""
    path = write_spelled(tmp_path / "reference.safetensors", "diffusion_model", "split")
    base = load_21("split")
    native = apply_native(base, path, 0.7)
    assert {key for key, _ in list_patched(native)} == {
        f"diffusion_model.{path}.weight" for path in LINEARS
    }
    image = sample_21(native)
    assert worst(image, sample_21(base)) > 100 * ROUNDING
    return image


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_gives_the_same_image_on_both_layouts_beside_and_merged(
    spelling, layout, reference, load_21, sample_21, apply_ours, apply_native, tmp_path
):
    path = write_spelled(tmp_path / "a.safetensors", spelling, layout)
    adapter = read_adapter(path)
    assert len(adapter) == len(LINEARS)
    assert not adapter.report.unmatched
    for base_layout in ("split", "fused"):
        base = load_21(base_layout)
        before = sample_21(base)
        assert worst(sample_21(apply_ours(base, adapter, 0.7, "side path")), reference) < ROUNDING
        merged = apply_ours(base, adapter, 0.7, "merge")
        assert worst(sample_21(merged), reference) < ROUNDING
        native = apply_native(base, path, 0.7)
        is_whole = list_patched(native) == list_patched(merged)
        if spelling in ("diffusion_model", "musubi") and layout == base_layout:
            assert is_whole  # in all versions of ComfyUI
        if is_whole:
            assert worst(sample_21(native), reference) < ROUNDING
        assert torch.equal(sample_21(base), before)


@pytest.mark.parametrize(
    ("spelling", "layout"), [("diffusion_model", "fused"), ("musubi", "fused"), ("PEFT", "split")]
)
def test_an_int8_base_gives_the_same_image_for_every_spelling(
    spelling, layout, load_21, sample_21, apply_ours, tmp_path
):
    expected = write_spelled(tmp_path / "reference.safetensors", "diffusion_model", "split")
    path = write_spelled(tmp_path / "a.safetensors", spelling, layout)
    base = load_21("int8_convrot")
    before = sample_21(base)
    for mode in ("side path", "merge"):
        found = sample_21(apply_ours(base, path, 0.7, mode))
        assert torch.equal(found, sample_21(apply_ours(base, expected, 0.7, mode)))
        assert worst(found, before) > 100 * ROUNDING
    assert torch.equal(sample_21(base), before)


def test_halves_that_share_their_factor_compute_its_product_once(
    load_21, apply_ours, ours, sample_21, tmp_path
):
    """A LoRA that was trained fused: of rank 4, and not of rank 8."""
    model = apply_ours(
        load_21("fused"), write_spelled(tmp_path / "a.safetensors", "bare", "fused"), 0.7
    )
    sample_21(model)
    bank = ours.side_path.get_side_path(model).bank.module
    site = bank.sites[f"transformer_blocks.0.{GATE_UP}"]
    shapes = [shape for shape, _, _ in site.pack.views]
    half = (dit_21.MLP_WIDTH, RANK)
    assert shapes == [(RANK, dit_21.WIDTH), half, half]
