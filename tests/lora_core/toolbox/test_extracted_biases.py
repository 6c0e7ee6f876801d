"""Biases, norms and other storages in extract."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import ShapeError, extract_adapter, read_adapter, write_adapter

TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
NORM = "transformer_blocks.0.attn.norm_q"


def make_models() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """to_q differs in weight and bias, to_k in its bias, and one norm differs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"{path}.weight": draw(48, 32) for path in (TO_Q, TO_K)}
    base |= {f"{path}.bias": draw(48) for path in (TO_Q, TO_K)}
    base[f"{NORM}.weight"] = draw(16)
    tuned = dict(base)
    tuned[f"{TO_Q}.weight"] = base[f"{TO_Q}.weight"] + draw(48, 2) @ draw(2, 32)
    for key in (f"{TO_Q}.bias", f"{TO_K}.bias", f"{NORM}.weight"):
        tuned[key] = base[key] + draw(*base[key].shape)
    return base, tuned


def test_biases_and_norms_are_kept_whole_and_survive_the_file(tmp_path):
    base, tuned = make_models()
    found = extract_adapter(base, tuned, rank=2)
    assert found.notes == ("Linears that do not differ: 1 of 2", "2 biases and 1 norm included")
    assert found.total_retained == pytest.approx(1.0)
    adapter = read_adapter(write_adapter(found.adapter, tmp_path / "out.safetensors"))
    assert {path: weights.kind for path, weights in adapter.modules.items()} == {
        TO_Q: "LoRA",
        TO_K: "diff",
        NORM: "diff",
    }
    for path in (TO_Q, TO_K):
        expected = tuned[f"{path}.bias"] - base[f"{path}.bias"]
        assert torch.equal(adapter.modules[path].bias_delta, expected)
    assert torch.equal(
        adapter.modules[NORM].delta(), tuned[f"{NORM}.weight"] - base[f"{NORM}.weight"]
    )


def test_biases_can_be_left_out_and_equal_ones_are(tmp_path):
    base, tuned = make_models()
    without = extract_adapter(base, tuned, rank=2, biases=False)
    assert list(without.adapter.modules) == [TO_Q]
    assert without.adapter.modules[TO_Q].bias_delta is None
    same = tuned | {key: tensor for key, tensor in base.items() if tensor.ndim == 1}
    found = extract_adapter(base, same, rank=2)
    assert found.adapter.modules[TO_Q].bias_delta is None
    assert found.notes == ("Linears that do not differ: 1 of 2",)


def test_a_bias_of_another_length_and_a_missing_one_are_reported():
    base, tuned = make_models()
    with pytest.raises(ShapeError, match=rf"shape of {TO_Q}.bias: \(5,\) against \(48,\)"):
        extract_adapter(base, tuned | {f"{TO_Q}.bias": torch.ones(5)}, rank=2)
    del tuned[f"{TO_Q}.bias"]
    found = extract_adapter(base, tuned, rank=2)
    assert found.adapter.modules[TO_Q].bias_delta is None
    assert "biases and norms in one model only, left out: 1" in found.notes


def test_an_int8_model_is_read_by_its_true_values():
    base, _ = make_models()
    stored, scale = base[f"{TO_Q}.weight"], 0.02
    codes = (stored / scale).round().clamp(-127, 127).to(torch.int8)
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(48, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    int8 = {f"{TO_Q}.weight": codes, f"{TO_Q}.weight_scale": torch.tensor(scale)}
    found = extract_adapter(int8, {f"{TO_Q}.weight": codes.float() * scale + delta}, rank=2)
    assert torch.allclose(found.adapter.modules[TO_Q].delta(), delta, atol=1e-4)
