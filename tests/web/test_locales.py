"""ComfyUI's page in Chinese: our translations are where the frontend looks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.web, pytest.mark.comfy]

ROOT = Path(__file__).resolve().parents[2]
TEXTS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))

#: Node id -> title, names of the inputs (as sockets and as widgets) and of the outputs.
READ_NODES = """ids => {
    app.graph.clear();
    return Object.fromEntries(ids.map(id => {
        const node = LiteGraph.createNode(id);
        app.graph.add(node);
        return [id, {
            title: node.title,
            sockets: node.inputs.map(i => [i.name, i.label ?? i.localized_name]),
            widgets: (node.widgets ?? []).map(w => [w.name, w.label]),
            outputs: node.outputs.map(o => o.label ?? o.localized_name),
        }];
    }));
}"""


@pytest.fixture
def chinese(open_workspace: Any) -> Iterator[Any]:
    """The page in Chinese by the browser's language, which leaves the server's settings alone."""
    workspace = open_workspace(locale="zh-CN")
    page = workspace.page
    assert page.evaluate("app.extensionManager.setting.get('Comfy.Locale')") == "zh"
    return workspace


def test_every_node_shows_its_chinese_title_and_names(chinese):
    shown = chinese.page.evaluate(READ_NODES, list(TEXTS))
    for node_id, texts in TEXTS.items():
        node, inputs = shown[node_id], texts.get("inputs", {})
        expected = {key: text["name"] for key, text in inputs.items()}
        assert node["title"] == texts["display_name"]
        assert node["outputs"] == [text["name"] for text in texts.get("outputs", {}).values()]
        for name, label in [*node["sockets"], *node["widgets"]]:
            # A growing list's sockets, the seed's control and the report are the frontend's or ours.
            key = name.replace(".", "_")
            if key in expected:
                assert label == expected[key], f"{node_id} {name}"
    chinese.shoot("chinese")
    assert chinese.errors == []


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_a_shipped_workflow_opens_in_chinese(chinese, vue_nodes):
    chinese.set_vue_nodes(vue_nodes)
    workflow = json.loads((ROOT / "workflows" / "01_apply_lora.json").read_text(encoding="utf-8"))
    chinese.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    chinese.page.wait_for_timeout(1000)
    titles = chinese.page.evaluate("app.graph._nodes.map(n => n.title)")
    assert TEXTS["QwenEditLoraLoad"]["display_name"] in titles
    if vue_nodes:  # what is drawn on a canvas cannot be read from the page
        chinese.page.get_by_text(TEXTS["QwenEditLoraApply"]["display_name"]).first.wait_for()
        name = TEXTS["QwenEditLoraApply"]["inputs"]["strength"]["name"]
        chinese.page.get_by_text(name, exact=True).first.wait_for()
    chinese.shoot(f"chinese_01_apply_lora_{'vue' if vue_nodes else 'classic'}")
    assert chinese.errors == []


def test_the_help_page_is_the_chinese_one(chinese):
    page = chinese.page
    page.evaluate(
        """() => {
            app.graph.clear();
            const node = LiteGraph.createNode('QwenEditLoraLoad');
            app.graph.add(node);
            app.canvas.selectNode(node);
        }"""
    )
    page.get_by_test_id("info-button").click()
    page.get_by_text("它不改动任何模型").first.wait_for()
    chinese.shoot("chinese_help")
    assert chinese.errors == []
