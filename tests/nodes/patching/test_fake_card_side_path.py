"""The side path on a fake card: every kind of site, wherever ComfyUI keeps its weights.

ComfyUI's own model, wrappers and casts; only the patcher's loading is done here, by `card.put`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.dit import TEXT_WIDTH, WIDTH
from fake_cuda.card import LAZY, FakeCard
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
)

pytestmark = pytest.mark.comfy

SHAPES = {
    "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.1.txt_mlp.net.2": (WIDTH, 4 * WIDTH),
}
KINDS = ("LoRA", "LoKr", "LoHa", "diff")


def build_weights(kind: str, rows: int, columns: int, rank: int = 4) -> ModuleWeights:
    bias = torch.ones(rows)
    return {
        "LoRA": lambda: LoraWeights(torch.ones(rank, columns), torch.ones(rows, rank), 2.0, bias),
        "LoKr": lambda: LokrWeights(w1=torch.ones(4, 4), w2=torch.ones(rows // 4, columns // 4)),
        "LoHa": lambda: LohaWeights(
            *(torch.ones(rows, rank), torch.ones(rank, columns)),
            *(torch.ones(rows, rank), torch.ones(rank, columns)),
        ),
        "diff": lambda: DiffWeights(torch.ones(rows, columns), bias),
    }[kind]()


def build(kind: str, name: str = "a", **options: int) -> Adapter:
    modules = {path: build_weights(kind, *shape, **options) for path, shape in SHAPES.items()}
    return Adapter(modules, name=name)


@pytest.fixture
def call(ours: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One call of the diffusion model as made by a sampler, through all wrappers."""
    ran: list[Any] = []
    run_site = ours.side_path.run_site

    def note(forward: Any, site: Any, *more: Any, **options: Any) -> torch.Tensor:
        ran.append(site)
        return run_site(forward, site, *more, **options)

    monkeypatch.setattr(ours.side_path, "run_site", note)

    def run(model: Any) -> torch.Tensor:
        ran.clear()
        out = model.model.apply_model(
            torch.randn(1, 16, 1, 8, 8, device=LAZY),
            torch.ones(1, device=LAZY),
            c_crossattn=torch.randn(1, 12, TEXT_WIDTH, device=LAZY),
            ref_latents=[torch.randn(1, 16, 1, 8, 8, device=LAZY)],
            # As comfy/sampler_helpers.py, prepare_model_patcher, puts them together.
            transformer_options={
                **model.model_options["transformer_options"],
                "wrappers": model.wrappers,
            },
        )
        assert len(ran) == len(SHAPES)
        return out

    return run


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "waiting on the CPU"])
@pytest.mark.parametrize("name", ["2509_fp32", "2511_bf16", "2509_fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_site_computes_on_a_card(
    kind, name, is_resident, load_base, ours, apply_ours, call
):
    applied = apply_ours(load_base(name), build(kind), 0.7, "side path")
    bank = ours.side_path.get_side_path(applied).get_bank()
    assert len(bank.module.sites) == len(SHAPES)
    with FakeCard(LAZY) as card, torch.no_grad():
        card.put(applied.model)
        if is_resident:
            card.put(bank.module)
        assert call(applied).device == LAZY
        with card.never_waiting():
            call(applied)


def test_stacked_adapters_of_different_scales_compute_on_a_card(base, ours, apply_ours, call):
    applied = base
    for number, (kind, rank) in enumerate((("LoRA", 4), ("LoRA", 7), ("LoKr", 4))):
        applied = apply_ours(applied, build(kind, str(number), rank=rank), 0.3 * number + 0.1)
    bank = ours.side_path.get_side_path(applied).get_bank()
    with FakeCard(LAZY) as card, torch.no_grad():
        card.put(applied.model)
        card.put(bank.module)
        with card.never_waiting():
            assert call(applied).device == LAZY


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_a_site_on_a_card(kind, base, ours, apply_ours):
    """A custom node may use them for guidance."""
    side_path = ours.side_path.get_side_path(apply_ours(base, build(kind), 0.7, "side path"))
    bank = side_path.get_bank()
    with FakeCard(LAZY) as card:
        diffusion_model = card.put(base.model).requires_grad_(False).diffusion_model
        card.put(bank.module)
        for module, site, gains in side_path.get_plan(diffusion_model):
            x = torch.randn(1, 9, module.in_features, device=LAZY, requires_grad=True)
            out = ours.side_path.run_site(module.forward, site, gains, x)
            out.square().mean().backward()
            assert x.grad.device == LAZY
