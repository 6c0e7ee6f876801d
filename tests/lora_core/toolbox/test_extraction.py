"""extract_adapter against the dense truth."""

from __future__ import annotations

import pytest
import torch
from demo_base import dit
from dense_algebra import (
    COLUMNS,
    ROWS,
    TO_K,
    TO_Q,
    TO_V,
    check_equal,
    check_figures,
    compute_dense,
    truncate,
)
from qwen_edit_lora.lora_core import (
    ConfigError,
    KeyFormatError,
    NonFiniteWeightsError,
    ShapeError,
    extract_adapter,
)
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_models(
    rank: int, dtype=torch.float32, shape: tuple[int, int] = (ROWS, COLUMNS)
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, the base plus deltas of that rank in float32, and the deltas."""
    base, tuned, deltas = {}, {}, {}
    for path in (TO_Q, TO_K):
        u, v = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
        base[f"{path}.weight"] = torch.randn(shape).to(dtype)
        deltas[path] = (u * torch.logspace(0, -1, rank)) @ v * 1e-2
        tuned[f"{path}.weight"] = base[f"{path}.weight"].float() + deltas[path]
    return base, tuned, deltas


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (200, 260)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extract_recovers_a_difference_of_known_rank(dtype, shape):
    base, tuned, deltas = make_models(4, dtype, shape)
    found = extract_adapter(base, tuned, rank=4)
    for path, delta in deltas.items():
        assert found.adapter.modules[path].rank == 4
        check_equal(compute_dense(found.adapter.modules[path]), delta.double(), 1e-4)
        assert found.retained[path] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (200, 260)])
def test_what_extract_leaves_out_is_measured_and_near_the_least_possible(shape):
    base, tuned, deltas = make_models(24, shape=shape)
    found = extract_adapter(base, tuned, rank=6)
    true = {path: (tuned[f"{path}.weight"] - base[f"{path}.weight"]).double() for path in deltas}
    check_figures(found, true)
    for path, delta in true.items():
        best = (delta - truncate(delta, 6)).norm().item()
        assert best * (1 - 1e-6) <= found.residual[path] <= best * 1.01
        missing = delta - compute_dense(found.adapter.modules[path])
        assert torch.linalg.matrix_norm(missing, 2) <= found.residual[path]


def test_a_bf16_pair_gives_a_bf16_adapter_of_measured_energy():
    base, tuned, _ = make_models(4, torch.bfloat16)
    tuned = {key: tensor.bfloat16() for key, tensor in tuned.items()}
    found = extract_adapter(base, tuned, rank=4)
    assert found.adapter.modules[TO_Q].dtype == torch.bfloat16
    check_figures(
        found, {path: (tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double())
                for path in (TO_Q, TO_K)},
    )  # fmt: skip
    assert 0.9 < found.total_retained < 1


def test_an_fp8_model_gives_a_bf16_adapter():
    base, tuned, _ = make_models(2)
    tuned = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tuned.items()}
    found = extract_adapter(base, tuned, rank=70)
    assert found.adapter.modules[TO_Q].dtype == torch.bfloat16
    true = {p: tuned[f"{p}.weight"].double() - base[f"{p}.weight"].double() for p in (TO_Q, TO_K)}
    check_figures(found, true)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled"])
def test_extract_reads_fp8_files_by_their_true_values(tmp_path, storage, prefix):
    base, _, deltas = make_models(4)
    base = {key: tensor * 0.05 for key, tensor in base.items()}
    stored = dit.store_as(base, storage)
    if storage == "fp8_scaled":
        acting = {
            f"{p}.weight": stored[f"{p}.weight"].float() * stored[f"{p}.weight_scale"]
            for p in deltas
        }
    else:
        acting = {f"{p}.weight": stored[f"{p}.weight"].float() for p in deltas}
    tuned = {f"{path}.weight": acting[f"{path}.weight"] + delta for path, delta in deltas.items()}
    save_file({prefix + key: t for key, t in stored.items()}, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = extract_adapter(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", 4)
    for path, delta in deltas.items():
        check_equal(compute_dense(found.adapter.modules[path]), delta.double(), 1e-4)
    assert found.adapter.name == "tuned.safetensors - base.safetensors"


def test_linears_that_do_not_differ_are_left_out_and_counted():
    base, tuned, _ = make_models(2)
    tuned[f"{TO_K}.weight"] = base[f"{TO_K}.weight"].clone()
    base[f"{TO_V}.bias"], tuned[f"{TO_V}.bias"] = torch.zeros(4), torch.ones(4)
    found = extract_adapter(base, tuned, rank=2)
    assert list(found.adapter.modules) == [TO_Q]
    assert found.notes == ("Linears that do not differ: 1 of 2",)


def test_extract_is_deterministic_and_keeps_the_random_state():
    base, tuned, _ = make_models(30, shape=(200, 260))
    state = torch.get_rng_state()
    first, second = (extract_adapter(base, tuned, rank=6).adapter.modules[TO_Q] for _ in range(2))
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_do_not_fit_are_refused_by_the_names_of_their_modules():
    base, tuned, _ = make_models(2)
    with pytest.raises(ConfigError, match="hold the same weights in all 2 Linears"):
        extract_adapter(base, base, rank=2)
    less = {f"{TO_Q}.weight": tuned[f"{TO_Q}.weight"]}
    with pytest.raises(KeyFormatError, match=rf"lacks 1 of the 2 Linears of .*{TO_K}; expected"):
        extract_adapter(base, less, rank=2)
    with pytest.raises(KeyFormatError, match=rf"lacks 1 of the 2 Linears of .*{TO_K}; expected"):
        extract_adapter(less, tuned, rank=2)
    other = tuned | {f"{TO_K}.weight": torch.randn(8, 8)}
    with pytest.raises(ShapeError, match=rf"{TO_K} \(8, 8\) against \(96, 80\); expected two"):
        extract_adapter(base, other, rank=2)
    packed = tuned | {f"{TO_K}.weight": torch.ones(ROWS, COLUMNS, dtype=torch.uint8)}
    with pytest.raises(ConfigError, match=rf"stores {TO_K} as uint8; expected bf16"):
        extract_adapter(base, packed, rank=2)
    broken = tuned | {f"{TO_K}.weight": torch.full((ROWS, COLUMNS), float("nan"))}
    with pytest.raises(NonFiniteWeightsError, match=f"{TO_K} differs by NaN or Inf"):
        extract_adapter(base, broken, rank=2)
    with pytest.raises(ConfigError, match="rank is 0"):
        extract_adapter(base, tuned, rank=0)
