"""The switches in the rows of Stack Qwen Edit LoRAs, and workflows saved before there were any."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.web, pytest.mark.comfy]

LORA = "my_edit_lora.safetensors"
#: As a workflow saved before the switches holds them.
OLD_VALUES = ["merge", "3 files", LORA, 0.25, "none", 0.5, LORA, 0.75, "0.5, 0.75"]
OPEN = """async values => {
    app.graph.clear();
    const node = LiteGraph.createNode('QwenEditLoraStack');
    app.graph.add(node);
    const saved = JSON.parse(JSON.stringify(app.graph.serialize()));
    saved.nodes[0].widgets_values = values;
    await app.loadGraphData(saved);
    await new Promise(r => setTimeout(r, 700));
    const [loaded] = app.graph._nodes;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [250 - loaded.pos[0], 200 - loaded.pos[1]];
    app.canvas.setDirty(true, true);
}"""
READ = """async () => {
    const [node] = app.graph._nodes;
    const { output } = await app.graphToPrompt();
    return {
        widgets: node.widgets.filter(w => !w.hidden && w.name !== 'report_view')
            .map(w => [w.name, w.value]),
        saved: app.graph.serialize().nodes[0].widgets_values,
        inputs: Object.values(output)[0].inputs,
    };
}"""
#: Where a widget of the classic renderer is, in px of the page.
LOCATE = """name => {
    const [node] = app.graph._nodes;
    const widget = node.widgets.find(w => w.name === name);
    const { offset } = app.canvas.ds;
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    return [node.pos[0] + offset[0] + left + node.size[0] / 2,
        node.pos[1] + offset[1] + top + widget.last_y + 10];
}"""


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_a_switch_of_a_row_is_saved_and_older_workflows_keep_their_values(workspace, vue_nodes):
    page = workspace.page
    workspace.set_vue_nodes(vue_nodes)
    page.evaluate(OPEN, OLD_VALUES)
    read = page.evaluate(READ)
    assert read["saved"] == [*OLD_VALUES, ""]
    rows = [
        *[["on_1", True], ["files.lora_1", LORA], ["files.strength_1", 0.25]],
        *[["on_2", True], ["files.lora_2", "none"], ["files.strength_2", 0.5]],
        *[["on_3", True], ["files.lora_3", LORA], ["files.strength_3", 0.75]],
    ]
    head, tail = [["mode", "merge"], ["files", "3 files"]], [["strengths", "0.5, 0.75"]]
    assert read["widgets"] == [*head, *rows, *tail]

    if vue_nodes:
        page.locator("[data-testid=node-widget]", has_text="File 3").get_by_role("switch").click()
    else:
        page.mouse.click(*page.evaluate(LOCATE, "on_3"))
    page.wait_for_timeout(500)
    workspace.shoot(f"stack_{'vue' if vue_nodes else 'classic'}")
    read = page.evaluate(READ)
    assert read["saved"] == [*OLD_VALUES, "3"]
    assert read["inputs"]["switched_off"] == "3"
    assert not [name for name in read["inputs"] if name.startswith("on_")]

    page.evaluate(OPEN, read["saved"])
    again = page.evaluate(READ)
    assert again["saved"] == read["saved"]
    rows[6] = ["on_3", False]
    assert again["widgets"] == [*head, *rows, *tail]

    page.evaluate(
        """() => {
            const files = app.graph._nodes[0].widgets.find(w => w.name === 'files');
            files.value = '1 file';
            files.callback?.('1 file');
        }"""
    )
    page.wait_for_timeout(500)
    names = [name for name, _ in page.evaluate(READ)["widgets"]]
    expected = ["mode", "files", "on_1", "files.lora_1", "files.strength_1", "strengths"]
    assert names == expected
    assert workspace.errors == []
