"""Starting values: by seed and path alone, and of the promised spread."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core.injection.initialization import compute_principal_factors
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject

from .conftest import TO_K, TO_Q


def test_an_initialization_depends_only_on_the_seed_and_the_path(model):
    few = inject(copy.deepcopy(model), LoraSettings(targets=(TO_K,)), seed=5)
    torch.randn(3)
    many = inject(copy.deepcopy(model), LoraSettings(), seed=5)
    other = inject(copy.deepcopy(model), LoraSettings(), seed=6)
    start = few.layers[TO_K].lora_A
    assert torch.equal(start, many.layers[TO_K].lora_A)
    assert not torch.equal(start, other.layers[TO_K].lora_A)
    assert not torch.equal(start, many.layers[TO_Q].lora_A)


def test_initializations_have_the_spread_their_names_promise():
    holder = torch.nn.Module()
    holder.add_module("proj_out", torch.nn.Linear(400, 64))
    starts = {}
    for init in ("kaiming", "gaussian", "orthogonal"):
        injection = inject(holder, LoraSettings(rank=32, init=init, targets=("proj_out",)))
        starts[init] = injection.layers["proj_out"].lora_A.detach()
        assert not injection.layers["proj_out"].lora_B.any()
        injection.eject()
    assert starts["kaiming"].abs().max() <= 1 / 20
    assert starts["kaiming"].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert starts["gaussian"].std().item() == pytest.approx(1 / 32, rel=0.02)
    torch.testing.assert_close(starts["orthogonal"] @ starts["orthogonal"].T, torch.eye(32))


@pytest.mark.parametrize("size", [(12, 20), (200, 160)])
def test_pissa_starts_on_the_leading_singular_vectors(size):
    """Small modules by an exact SVD, large ones by a randomised one."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(size, generator=generator), full_matrices=False)
    values = 0.6 ** torch.arange(len(vh))
    down, up = compute_principal_factors((u * values) @ vh, 4, 0.5)
    torch.testing.assert_close(
        0.5 * up @ down, (u[:, :4] * values[:4]) @ vh[:4], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
