"""ComfyUI's page in Chinese: our translations are where the frontend looks for them."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_the_page_in_chinese_shows_our_names_and_our_help(chinese):
    page = chinese.page
    shown = page.evaluate(READ_NODES, list(TEXTS))
    for node_id, texts in TEXTS.items():
        node, inputs = shown[node_id], texts.get("inputs", {})
        assert node["title"] == texts["display_name"]
        assert node["outputs"] == [text["name"] for text in texts.get("outputs", {}).values()]
        for name, label in [*node["sockets"], *node["widgets"]]:
            key = name.replace(".", "_")
            if key in inputs:  # or a socket of a growing list, the seed's control or the report
                assert label == inputs[key]["name"], f"{node_id} {name}"
    chinese.set_vue_nodes(True)
    workflow = json.loads((ROOT / "workflows" / "1 Apply a LoRA.json").read_text(encoding="utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    texts = TEXTS["QwenEditLoraApply"]
    node = page.locator(".lg-node").filter(has_text=texts["display_name"])
    for name in (texts["inputs"]["strength"]["name"], texts["outputs"]["1"]["name"]):
        node.get_by_text(name, exact=True).first.wait_for()
    node.get_by_text(texts["display_name"]).first.click()
    page.get_by_test_id("info-button").click()
    page.get_by_text("换强度只改一个数").first.wait_for()
    chinese.shoot("chinese")
    assert chinese.errors == []
