"""An inspection beside its base, against dense float64."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    compute_delta,
)
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from safetensors.torch import save_file

ROWS, COLUMNS = 96, 60
PATH = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.05


def make(kind: str):
    lora = LoraWeights(draw(4, COLUMNS), draw(ROWS, 4), 2.0)
    return {
        "LoRA": lambda: lora,
        "LoHa": lambda: LohaWeights(
            draw(ROWS, 9), draw(9, COLUMNS), draw(ROWS, 9), draw(9, COLUMNS), 1.0
        ),
        "LoKr": lambda: LokrWeights(w1=draw(4, 6), w2=draw(24, 10)),
        "DoRA": lambda: DoraWeights(lora, draw(ROWS, 1).abs() + 0.2),
        "OFT": lambda: OftWeights(draw(12, 8, 8)),
    }[kind]()


def make_base(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    weight += 0.3 * torch.outer(torch.ones(ROWS) / ROWS**0.5, torch.ones(COLUMNS) / COLUMNS**0.5)
    return weight.to(dtype)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA", "OFT"])
def test_statistics_relative_to_the_base_equal_dense_float64(kind):
    weights, base = make(kind), make_base()
    found = inspect_adapter(Adapter({PATH: weights}), {f"{PATH}.weight": base}).modules[PATH]
    delta, dense = compute_delta(weights, base).double(), base.double()
    u, sigma, vt = torch.linalg.svd(dense)
    delta_sigma = torch.linalg.svdvals(delta)[0]
    expected = {
        "frobenius": dense.norm(),
        "ratio": delta.norm() / dense.norm(),
        "cosine": (delta * dense).sum() / (delta.norm() * dense.norm()),
        "spectral": sigma[0],
        "spectral_ratio": delta_sigma / sigma[0],
        "alignment": (u[:, 0] @ delta @ vt[0]).abs() / delta_sigma,
    }
    for name, value in expected.items():
        assert getattr(found.base, name) == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    for strength in (-1.0, 0.0, 0.5, 2.0):
        norm = (dense + strength * delta).norm().item()
        assert found.base.compute_norm(strength) == pytest.approx(norm, rel=1e-5)
    assert found.std == pytest.approx(delta.std(correction=0).item(), rel=1e-5)
    assert not found.is_direction_only


def make_small_adapter(std: float, num_modules: int = 3) -> tuple[Adapter, dict]:
    modules, base = {}, {}
    for block in range(num_modules):
        path = f"transformer_blocks.{block}.attn.to_q"
        modules[path] = LoraWeights(torch.randn(16, 128), torch.randn(256, 16) * std / 4)
        base[f"{path}.weight"] = torch.randn(256, 128) * 0.02
    return Adapter(modules, name="small"), base


def test_an_fp8_file_drowns_a_small_lora_and_the_verdict_says_use_the_side_path(tmp_path):
    adapter, base = make_small_adapter(3e-4)
    stored = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in base.items()}
    save_file(stored, tmp_path / "base.safetensors")
    found = inspect_adapter(adapter, tmp_path / "base.safetensors")
    assert found.merge_error > 1.5
    for module in found.modules.values():
        assert module.base.storage == "float8_e4m3fn"
        assert module.base.merge_error_predicted == pytest.approx(
            module.base.merge_error_measured, rel=0.15
        )
    (sentence,) = (s for s in found.verdict if s.startswith("merged into this float8_e4m3fn base"))
    assert "by real rounding in 3 modules" in sentence
    assert sentence.endswith("use the side path")


def test_a_bf16_base_keeps_a_lora_of_usual_size():
    adapter, base = make_small_adapter(1e-3)
    found = inspect_adapter(adapter, {k: v.bfloat16() for k, v in base.items()})
    assert found.merge_error < 0.25
    assert any(s.startswith("survives merging into this bfloat16") for s in found.verdict)
    assert found.base_ratio == pytest.approx(1e-3 / 0.02, rel=0.1)


def test_modules_that_do_not_match_the_base_are_reported_individually():
    adapter, base = make_small_adapter(3e-4)
    first, second, third = adapter.modules
    del base[f"{first}.weight"]
    base[f"{second}.weight"] = torch.randn(64, 64)
    found = inspect_adapter(adapter, base)
    assert found.skipped[first] == "the base has no such module"
    assert found.skipped[second] == (
        "the base's weight is (64, 64), the adapter was made for (256, 128)"
    )
    assert found.misfits == (first, second)
    assert list(found.modules) == [third]


def test_the_wrong_base_is_named_instead_of_the_adapter():
    adapter, base = make_small_adapter(3e-4)
    (first, *_) = adapter.modules
    found = inspect_adapter(adapter, {key: torch.randn(64, 64) for key in base})
    (sentence,) = found.verdict
    assert sentence.startswith("nothing to judge: none of 3 modules fits this base")
    assert f"{first}: the base's weight is (64, 64)" in sentence
    assert "choose the base it was trained on" in sentence


def test_a_change_of_a_norm_is_not_a_mismatch():
    adapter, base = make_small_adapter(3e-4)
    norm = DiffWeights(torch.ones(64))
    found = inspect_adapter(Adapter({**adapter.modules, "txt_norm": norm}, name="a"), base)
    assert list(found.skipped) == ["txt_norm"]
    assert found.misfits == ()


def test_the_base_file_is_read_one_module_at_a_time(tmp_path, monkeypatch):
    from qwen_edit_lora.lora_core.disk.safetensors_file import UnmappedFile

    adapter, base = make_small_adapter(3e-4)
    save_file({**base, "unrelated.weight": torch.zeros(8)}, tmp_path / "base.safetensors")
    read, original = [], UnmappedFile.read

    def note(self, key):
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(UnmappedFile, "read", note)
    inspect_adapter(adapter, tmp_path / "base.safetensors")
    assert read == list(base)
