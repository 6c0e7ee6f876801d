"""Applying to a 2.1 in each layout: side path, merge and ComfyUI's own patches agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from demo_base import dit_21
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    compute_delta,
)
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

from ..conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5  # float32, two steps
LINEARS = dit_21.list_linears()
OUT = [path for path in LINEARS if path.endswith("img_mlp.out")]
HALVES = [path for path in LINEARS if path.endswith(("gate_layer", "img_mlp.proj"))]


def draw(*shape: int, seed: int, size: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def build_adapter(paths: Iterable[str] = LINEARS, kind: str = "LoRA", seed: int = 0) -> Adapter:
    modules: dict[str, Any] = {}
    for index, path in enumerate(paths):
        (out, columns), s = LINEARS[path], seed + 10 * index
        lora = LoraWeights(draw(4, columns, seed=s), draw(out, 4, seed=s + 1), 2.0 + index % 3)
        modules[path] = {
            "LoRA": lora,
            "LoHa": LohaWeights(
                *(draw(out, 3, seed=s), draw(3, columns, seed=s + 1)),
                *(draw(out, 3, seed=s + 2) * 9, draw(3, columns, seed=s + 3)),
            ),
            "LoKr": LokrWeights(w1=draw(4, 8, seed=s), w2=draw(out // 4, columns // 8, seed=s + 1)),
            "diff": DiffWeights(draw(out, columns, seed=s, size=0.01)),
            "DoRA": DoraWeights(lora, draw(out, 1, seed=s + 2).abs() + 0.5),
        }[kind]
    return Adapter(modules, name=f"drawn {kind}")


def add_by_hooks(model: Any, adapter: Adapter, strength: float) -> list[Any]:
    """The definition: each Linear's output plus the delta times its input."""
    root, handles = model.model.diffusion_model, []

    def hook(path: str, delta: torch.Tensor, rows: slice) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[..., rows] += strength * torch.nn.functional.linear(inputs[0], delta)
            return output

        return root.get_submodule(path).register_forward_hook(add)

    for path, weights in adapter.modules.items():
        delta = compute_delta(weights)
        place, rows = path, slice(None)
        if path in HALVES and hasattr(root.transformer_blocks[0].img_mlp, "gate_up"):
            place = path.rpartition(".")[0] + ".gate_up"
            start = 0 if path.endswith("gate_layer") else dit_21.MLP_WIDTH
            rows = slice(start, start + dit_21.MLP_WIDTH)
        handles.append(hook(place, delta, rows))
    return handles


@pytest.fixture
def sample_by_hooks(comfyui, sample_21, monkeypatch):
    def run(model: Any, adapter: Adapter, strength: float) -> torch.Tensor:
        def run_eagerly(linear: Any, x: torch.Tensor, act: str) -> torch.Tensor:
            return linear(comfyui.ops.INPUT_ACT_EAGER[act](x))

        handles = add_by_hooks(model, adapter, strength)
        with monkeypatch.context() as patch:
            patch.setattr(comfyui.ops, "linear_input_act", run_eagerly)
            result = sample_21(model)
        for handle in handles:
            handle.remove()
        return result

    return run


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_the_side_path_adds_every_delta_in_every_layout(
    kind, base_21, sample_21, sample_by_hooks, apply_ours
):
    adapter = build_adapter(kind=kind)
    before = sample_21(base_21)
    expected = sample_by_hooks(base_21, adapter, 0.7)
    assert worst(expected, before) > 100 * ROUNDING
    result = sample_21(apply_ours(base_21, adapter, 0.7, "side path"))
    if hasattr(base_21.model.diffusion_model.transformer_blocks[0].attn.to_q.weight, "_qdata"):
        # The last bit of an activation decides to which int8 it is rounded.
        assert (result - expected).norm() < 0.06 * (expected - before).norm()
    else:
        assert worst(result, expected) < ROUNDING
    assert torch.equal(sample_21(base_21), before)
    assert not any("forward" in m.__dict__ for m in base_21.model.diffusion_model.modules())


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_a_merge_equals_the_side_path(kind, layout, load_21, sample_21, apply_ours):
    base, adapter = load_21(layout), build_adapter(kind=kind)
    before = sample_21(base)
    beside = sample_21(apply_ours(base, adapter, 0.7, "side path"))
    assert worst(sample_21(apply_ours(base, adapter, 0.7, "merge")), beside) < ROUNDING
    assert torch.equal(sample_21(base), before)


def test_a_dora_is_merged_to_the_same_image_in_a_split_and_a_fused_base(
    load_21, sample_21, apply_ours
):
    adapter = build_adapter(kind="DoRA")
    split = sample_21(apply_ours(load_21("split"), adapter, 0.7))
    fused = load_21("fused")
    before = sample_21(fused)
    assert worst(split, before) > 100 * ROUNDING
    assert worst(sample_21(apply_ours(fused, adapter, 0.7)), split) < ROUNDING
    assert torch.equal(sample_21(fused), before)


def test_the_merge_into_an_int8_base_is_near_the_side_path(load_21, sample_21, apply_ours):
    base, adapter = load_21("int8_convrot"), build_adapter()
    before = sample_21(base)
    beside = sample_21(apply_ours(base, adapter, 1.0, "side path"))
    merged = sample_21(apply_ours(base, adapter, 1.0, "merge"))
    assert (merged - beside).norm() < 0.2 * (beside - before).norm()
    assert torch.equal(sample_21(base), before)


def test_the_warning_of_rounding_counts_the_int8_weights_of_a_mixed_file(load_21, ours):
    """Its Linears outside the blocks are no int8, and an adapter's keys often begin with those."""
    in_blocks = [path for path in LINEARS if path.startswith("transformer_blocks.")]
    paths = [*(path for path in LINEARS if path not in in_blocks), *in_blocks]
    layers = [(build_adapter(paths), Strengths(1.0))]
    with torch.inference_mode():
        done = ours.application.apply_adapters(load_21("int8_convrot"), layers, "merge")
    (warning,) = [finding for finding in done.findings if finding.kind == "merge_rounds"]
    assert warning.count == len(in_blocks) < len(paths)
    assert "int8" in warning.text


@pytest.mark.parametrize("half", ["gate_layer", "img_mlp.proj"])
def test_one_half_alone_changes_the_same_rows_in_every_way(
    half, load_21, sample_21, sample_by_hooks, apply_ours
):
    adapter = build_adapter([path for path in LINEARS if path.endswith(half)])
    split, fused = load_21("split"), load_21("fused")
    expected = sample_by_hooks(split, adapter, -0.6)
    assert worst(expected, sample_21(split)) > 100 * ROUNDING
    for mode in ("side path", "merge"):
        assert worst(sample_21(apply_ours(fused, adapter, -0.6, mode)), expected) < ROUNDING


def test_out_is_served_where_the_int8_kernel_takes_its_place(
    load_21, sample_21, apply_ours, ours, comfyui, monkeypatch
):
    base, adapter = load_21("int8_convrot"), build_adapter(OUT)
    model = apply_ours(base, adapter, 0.7)
    forwards: list[Any] = []
    monkeypatch.setattr(ours.side_path, "run_site", lambda *args, **_: forwards.append(args))
    sample_21(model)  # loads the bank
    assert not forwards  # else this tests nothing
    side_path = ours.side_path.get_side_path(model)
    assert side_path.findings == ()
    root, x = base.model.diffusion_model, draw(2, 5, dit_21.WIDTH, seed=1, size=1.0)
    with torch.inference_mode():
        for block in range(dit_21.NUM_BLOCKS):
            mlp = root.transformer_blocks[block].img_mlp
            activation = comfyui.ops.INPUT_ACT_EAGER["swiglu"](mlp.gate_up(x))
            delta = compute_delta(adapter.modules[OUT[block]])
            expected = mlp(x) + 0.7 * activation @ delta.T
            with ours.side_path.swapped_forwards(root, side_path):
                found = mlp(x)
            assert worst(found, mlp(x)) > 100 * ROUNDING
            assert worst(found, expected) < ROUNDING
    assert not forwards


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("calls_forward", [False, True])
def test_out_is_served_once_in_the_newer_form_with_a_residual(
    calls_forward, residual, load_21, sample_21, apply_ours, ours, comfyui, monkeypatch
):
    """ComfyUI 0.36 and later: residual + residual_scale * linear(act(x))."""
    base, adapter = load_21("fused"), build_adapter(OUT)
    model = apply_ours(base, adapter, 0.7)
    sample_21(model)  # loads the bank
    root, act = base.model.diffusion_model, comfyui.ops.INPUT_ACT_EAGER["swiglu"]

    def run(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None, residual_scale=None):
        if calls_forward or not hasattr(linear, "in_features"):
            y = linear(act(x))
        else:
            y = torch.nn.functional.linear(act(x), linear.weight)
        return y if residual is None else torch.addcmul(residual, y, residual_scale)

    monkeypatch.setattr(comfyui.ops, "linear_input_act", run)
    out = root.transformer_blocks[1].img_mlp.out
    x = draw(2, 5, 2 * dit_21.MLP_WIDTH, seed=1, size=1.0)
    more = {}
    if residual:
        more["residual"] = draw(2, 5, dit_21.WIDTH, seed=2)
        more["residual_scale"] = draw(2, 1, dit_21.WIDTH, seed=3)
    with torch.inference_mode():
        part = 0.7 * act(x) @ compute_delta(adapter.modules[OUT[1]]).T
        expected = run(out, x, "swiglu", **more) + part * more.get("residual_scale", 1.0)
        with ours.side_path.swapped_forwards(root, ours.side_path.get_side_path(model)):
            found = comfyui.ops.linear_input_act(out, x, "swiglu", **more)
    assert worst(found, expected) < ROUNDING
    assert comfyui.ops.linear_input_act is run


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_gate_and_proj_read_x_once_in_both_layouts(
    layout, load_21, sample_21, apply_ours, monkeypatch
):
    from qwen_edit_lora.nodes.patching.bank import DownProduct

    products: list[int] = []
    compute = DownProduct.compute

    def record(self: Any, site: int, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        products.append(len(down))
        return compute(self, site, x, down)

    monkeypatch.setattr(DownProduct, "compute", record)
    sample_21(apply_ours(load_21(layout), build_adapter(HALVES), 0.7))
    assert products == [8] * dit_21.NUM_BLOCKS * 2  # two steps
