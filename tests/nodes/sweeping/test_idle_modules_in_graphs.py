"""Which node of a graph is told of modules that sampling did not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from demo_base.prompts import node

from .test_sweep_bits import COND, KSAMPLER, LORA, base_graph, sweep_graph

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module", autouse=True)
def lora(demo_models: Any) -> Iterator[None]:
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.3)
    yield
    path.unlink()


@pytest.fixture
def events(executor: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(node, source) of each, while every MLP computes its last Linear by itself."""
    from comfy.ldm.qwen_image.model import FeedForward
    from qwen_edit_lora.nodes.host import events

    def forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        last = self.net[2]
        return torch.nn.functional.linear(self.net[1](self.net[0](x)), last.weight, last.bias)

    found: list[tuple[str, str]] = []
    monkeypatch.setattr(FeedForward, "forward", forward)
    monkeypatch.setattr(
        events, "_send", lambda name, data: found.append((data["node"], data["source"]))
    )
    return found


def run(executor: Any, graph: dict[str, Any]) -> None:
    executor.execute(graph, "idle", {}, ["end"])
    assert executor.success, executor.status_messages[-1]


def test_the_apply_node_is_told(executor, events):
    links = {**COND, "latent_image": ["latent", 0], "seed": 1}
    graph = {
        **base_graph(1.0),
        "sampler": node("KSampler", model=["apply", 0], **KSAMPLER, **links),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "end": node("PreviewImage", images=["decoded", 0]),
    }
    run(executor, graph)
    assert events == [("apply", "apply")]


def test_a_sweep_is_told_of_the_nodes_it_expands_into(executor, events):
    run(executor, sweep_graph(strengths="0, 0.5, 1"))
    assert [shown for shown, _ in events] == ["sweep", "sweep"]
    assert len({source for _, source in events} - {"sweep"}) == 2
