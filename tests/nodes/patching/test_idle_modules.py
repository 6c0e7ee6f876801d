"""Modules that the model does not run: found in the first call of a sampling, told to the node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core import read_adapter
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

pytestmark = pytest.mark.comfy

BLOCK = "transformer_blocks.1.img_mlp.net.2"


@pytest.fixture
def events(ours, monkeypatch) -> list[dict[str, Any]]:
    """What the page is told."""
    from qwen_edit_lora.nodes.host import events
    from qwen_edit_lora.nodes.patching import idle_modules

    found: list[dict[str, Any]] = []
    monkeypatch.setattr(events, "_send", lambda name, data: found.append({"name": name, **data}))
    monkeypatch.setattr(idle_modules, "_flagged", set())
    return found


@pytest.fixture
def node(ours) -> Any:
    return ours.host.RunningNode("4.0.0.apply", "4")


class ComputedElsewhere(torch.nn.Module):
    """Another extension's replacement of a Linear: the same result, the forward never called."""

    def __init__(self, linear: Any):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.linear.weight, self.linear.bias)


@pytest.fixture
def block_mlp(base) -> Any:
    """The second block's image MLP; its last Linear can be replaced in what it runs."""
    return base.model.diffusion_model.transformer_blocks[1].img_mlp


def bypass(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ComputedElsewhere(mlp.net[2])

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return elsewhere(mlp.net[1](mlp.net[0](x)))

    monkeypatch.setitem(mlp.__dict__, "forward", forward)


def apply(ours: Any, base: Any, path: Any, node: Any, **more: Any) -> Any:
    layers = [(read_adapter(path), Strengths(1.0, **more))]
    with torch.inference_mode():
        return ours.application.apply_adapters(base, layers, node=node).model


def test_one_module_that_is_not_run_is_named_on_the_node_that_applied_it(
    base, sample, make_lora, ours, node, events, block_mlp, monkeypatch, caplog
):
    model = apply(ours, base, make_lora("a"), node)
    sample(model)
    assert events == []
    bypass(block_mlp, monkeypatch)
    with caplog.at_level("WARNING"):
        sample(model)
    (event,) = events
    assert event["name"] == "qwen_edit_lora.finding"
    assert (event["node"], event["source"]) == ("4", "4.0.0.apply")
    finding = event["finding"]
    assert (finding["kind"], finding["severity"], finding["count"]) == (
        *("modules_not_run", "warning"),
        1,
    )
    assert f"did not run 1 of the 24 modules the LoRA acts on, such as {BLOCK}" in finding["text"]
    assert "Use mode 'merge'" in finding["text"]
    assert any(finding["text"] in record.getMessage() for record in caplog.records)
    assert [one.text for one in ours.side_path.get_side_path(model).findings] == [finding["text"]]


def test_the_finding_is_taken_back_once_all_modules_run(
    base, sample, make_lora, ours, node, events, block_mlp
):
    model = apply(ours, base, make_lora("a"), node)
    with pytest.MonkeyPatch.context() as patch:
        bypass(block_mlp, patch)
        sample(model)
    sample(model)
    sample(model)
    assert [event["finding"] is None for event in events] == [False, True]


def test_a_module_at_strength_0_need_not_run(
    base, sample, make_lora, ours, node, events, block_mlp, monkeypatch
):
    bypass(block_mlp, monkeypatch)
    sample(apply(ours, base, make_lora("a"), node, image_strength=0.0))
    sample(apply(ours, base, make_lora("b"), node, blocks=frozenset({0})))
    assert events == []


def test_each_node_is_told_of_its_own_modules(
    base, sample, make_lora, ours, node, events, block_mlp, monkeypatch
):
    other = ours.host.RunningNode("7", "7")
    bypass(block_mlp, monkeypatch)
    model = apply(ours, base, make_lora("a"), node, text_strength=0.0)
    sample(apply(ours, model, make_lora("b"), other, blocks=frozenset({0})))
    assert [event["source"] for event in events] == ["4.0.0.apply"]
    assert "1 of the 12 modules" in events[0]["finding"]["text"]


def test_a_lora_of_which_nothing_runs_leaves_the_image_of_the_base_and_says_so(
    base, sample, make_lora, ours, node, events, monkeypatch
):
    import copy

    root = base.model.diffusion_model
    twin = copy.deepcopy(root)
    monkeypatch.setitem(root.__dict__, "_forward", twin._forward)
    sample(apply(ours, base, make_lora("a"), node))
    assert events[0]["finding"]["text"].startswith("the model ran none of the 24 modules")
