"""Reports on the nodes, and what they must not affect, in the real page."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.web, pytest.mark.comfy]

READ_ALL = """() => {
    const graphs = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
    const nodes = graphs.flatMap(g => g._nodes).filter(n => n.showReport);
    return Object.fromEntries(nodes.map(n => [
        n.comfyClass, n.widgets.find(w => w.name === 'report_view').element
            .querySelector('.qwen-edit-lora-report').textContent]));
}"""


def test_reports_reach_nodes_inside_a_subgraph_and_come_back(workspace):
    page = workspace.page
    workspace.open_template("3 Compare and resize LoRAs")
    page.evaluate(
        """() => { app.canvas.graph.convertToSubgraph(
            new Set(app.graph._nodes.filter(n => n.comfyClass === 'QwenEditLoraLoad'))); }"""
    )
    assert workspace.run()["status"]["status_str"] == "success"
    page.wait_for_timeout(1000)
    reports = page.evaluate(READ_ALL)
    assert "matched 20 modules" in reports["QwenEditLoraLoad"]
    assert "20 modules compared" in reports["QwenEditLoraCompare"]
    # As when a reloaded page fetches the outputs of the last run.
    page.evaluate(
        """() => {
            for (const g of [app.rootGraph, ...app.rootGraph.subgraphs.values()])
                for (const n of g._nodes) n.showReport?.({qwen_edit_lora_report: ['']});
        }"""
    )
    assert page.evaluate(READ_ALL) != reports
    page.evaluate("() => { app.nodeOutputs = app.nodeOutputs; }")
    assert page.evaluate(READ_ALL) == reports
    assert workspace.errors == []


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_the_report_keeps_out_of_saved_and_copied_values(workspace, vue_nodes):
    page = workspace.page
    workspace.set_vue_nodes(vue_nodes)
    read = """n => n.widgets.filter(w => w.name !== 'report_view').map(w => [w.name, w.value])"""
    before, saved, after, copied = page.evaluate(
        f"""async () => {{
            const read = {read};
            app.graph.clear();
            const node = LiteGraph.createNode('QwenEditLoraStack');
            app.graph.add(node);
            const files = node.widgets.find(w => w.name === 'files');
            files.value = '3 files';
            files.callback?.('3 files');
            await new Promise(r => setTimeout(r, 500));
            node.widgets.filter(w => /strength_\\d/.test(w.name))
                .forEach((w, i) => {{ w.value = 0.25 * (i + 1); }});
            node.widgets.find(w => w.name === 'strengths').value = '0.5, 0.75';
            node.showReport({{qwen_edit_lora_report: ['a report']}});
            const before = read(node);
            const saved = JSON.parse(JSON.stringify(app.graph.serialize()));
            const clone = node.clone();
            app.graph.add(clone);
            await new Promise(r => setTimeout(r, 500));
            const copied = read(clone);
            await app.loadGraphData(saved);
            await new Promise(r => setTimeout(r, 500));
            return [before, saved.nodes[0].widgets_values, read(app.graph._nodes[0]), copied];
        }}"""
    )
    assert len([name for name, _ in before if "strength_" in name]) == 3
    assert "a report" not in str(saved)
    assert after == before
    assert copied == before
    assert workspace.errors == []


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_an_error_is_shown_on_the_node_in_one_sentence(workspace, demo_models, vue_nodes):
    page = workspace.page
    broken = demo_models.root / "loras" / "broken.safetensors"
    broken.write_bytes(b"")
    try:
        page.reload()
        page.wait_for_function("window.app?.graph && window.app?.extensionManager")
        workspace.set_vue_nodes(vue_nodes)
        page.evaluate(
            """() => {
                app.graph.clear();
                const load = LiteGraph.createNode('QwenEditLoraLoad');
                const save = LiteGraph.createNode('QwenEditLoraSave');
                app.graph.add(load);
                app.graph.add(save);
                load.widgets[0].value = 'broken.safetensors';
                load.connect(0, save, 0);
            }"""
        )
        entry = workspace.run()
        page.wait_for_timeout(500)
        reports = page.evaluate(READ_ALL)
    finally:
        broken.unlink()
    assert entry["status"]["status_str"] == "error"
    assert reports["QwenEditLoraLoad"].startswith("broken.safetensors is empty (0 bytes); expected")
    assert "The report appears here" in reports["QwenEditLoraSave"]
    workspace.shoot(f"error_{'vue' if vue_nodes else 'classic'}")


COMPARE = """async () => {
    const load = {class_type: 'QwenEditLoraLoad', inputs: {lora_name: 'my_edit_lora.safetensors'}};
    await app.loadApiJson({1: load,
        2: {class_type: 'QwenEditLoraCompare', inputs: {adapter_a: ['1', 0], adapter_b: ['1', 0]}}},
        'compare');
    const node = app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraCompare');
    node.setSize([480, node.size[1]]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [150 - node.pos[0], 150 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""
#: The report on a node, and the boxes of both as the page draws them.
MEASURE = """type => {
    const node = app.graph._nodes.find(n => n.comfyClass === type);
    const box = node.widgets.find(w => w.name === 'report_view').element.firstElementChild;
    const text = box.firstElementChild;
    const vue = document.querySelector(`[data-node-id="${node.id}"]`);
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const bottom = (node.pos[1] + node.size[1] + offset[1]) * scale + canvas.top;
    return {
        lines: [...text.children].filter(e => e.checkVisibility()).map(e => e.textContent),
        advice: text.querySelector('.qel-advice')?.textContent,
        bottom: box.getBoundingClientRect().bottom,
        bottomOfNode: vue ? vue.getBoundingClientRect().bottom : bottom,
        height: box.clientHeight,
        hidden: text.scrollHeight - text.clientHeight,
        font: getComputedStyle(text).fontFamily,
        isOpen: text.querySelector('details')?.open,
    };
}"""


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_a_report_starts_with_advice_and_is_as_high_as_its_text(workspace, vue_nodes):
    page = workspace.page
    workspace.set_vue_nodes(vue_nodes)
    page.evaluate(COMPARE)
    page.wait_for_timeout(500)
    assert workspace.run()["status"]["status_str"] == "success"
    page.wait_for_timeout(1500)
    folded = page.evaluate(MEASURE, "QwenEditLoraCompare")
    assert folded["advice"] == folded["lines"][0]
    assert folded["lines"][0].startswith("Use either: both make the same edit (cosine 1.000)")
    assert "monospace" not in folded["font"]
    assert not folded["isOpen"]
    report = page.get_by_role("group", name="Report of this node").last
    report.get_by_text("Figures").click()
    page.wait_for_timeout(700)
    unfolded = page.evaluate(MEASURE, "QwenEditLoraCompare")
    assert unfolded["isOpen"]
    assert unfolded["height"] > folded["height"] + 50
    report.get_by_text("subspace overlap, all directions").wait_for()
    workspace.shoot(f"report_unfolded_{'vue' if vue_nodes else 'classic'}")
    report.get_by_text("Figures").click()
    page.wait_for_timeout(700)
    again = page.evaluate(MEASURE, "QwenEditLoraCompare")
    assert again["height"] == folded["height"]
    for shown in (folded, unfolded, again):
        assert shown["hidden"] <= 1  # no scroll bar
        assert shown["bottom"] <= shown["bottomOfNode"]
    page.evaluate(
        """() => app.graph._nodes.find(n => n.comfyClass === 'QwenEditLoraLoad').showReport(
            {qwen_edit_lora_report: [Array(9).fill('a line of a report').join('\\n')]})"""
    )
    page.wait_for_timeout(700)
    longer = page.evaluate(MEASURE, "QwenEditLoraLoad")
    assert len(longer["lines"]) == 9
    assert longer["hidden"] <= 1
    assert longer["bottom"] <= longer["bottomOfNode"]
    assert workspace.errors == []


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
def test_the_image_of_a_node_opens_large(workspace, vue_nodes):
    page = workspace.page
    workspace.set_vue_nodes(vue_nodes)
    page.evaluate(COMPARE)
    page.wait_for_timeout(500)
    assert workspace.run()["status"]["status_str"] == "success"
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Open large").click()
    dialog = page.get_by_role("dialog", name="Open large")
    image = dialog.get_by_role("img")
    image.wait_for()
    page.wait_for_function("document.querySelector('.qel-viewer img').naturalWidth >= 1024")
    assert image.bounding_box()["height"] > 600
    assert not dialog.get_by_text("Compare with").is_visible()  # there is nothing to compare with
    assert not dialog.get_by_role("button", name="Next").is_visible()
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert workspace.errors == []


def test_numbers_on_the_page_follow_the_rule_of_the_reports(workspace):
    found = workspace.page.evaluate(
        """async () => {
            const page = await import('/extensions/qwen-edit-lora/format.js');
            return [
                [0, 0.000012345, 0.98765, 45.678].map(value => page.formatNumber(value)),
                [999, 12345, 999999, 212345678, 1.18e9].map(value => page.formatSize(value)),
                [0.2512, 59.96, 720, 12000].map(value => page.formatDuration(value)),
            ];
        }"""
    )
    assert found == [
        ["0", "1.23e-5", "0.988", "45.7"],
        ["999 B", "12.3 kB", "1 MB", "212 MB", "1.18 GB"],
        ["0.251 s", "1 min", "12 min", "3 h 20 min"],
    ]


def test_labels_of_an_axis_differ(workspace):
    labels = workspace.page.evaluate(
        """async () => {
            const { CurveChart } = await import('/extensions/qwen-edit-lora/panel/curve_chart.js');
            const { formatSize } = await import('/extensions/qwen-edit-lora/format.js');
            const ticks = [1.1801e9, 1.1802e9, 1.1803e9];
            return CurveChart.prototype.labelTicks.call({ format: formatSize }, ticks);
        }"""
    )
    assert labels == ["1.1801 GB", "1.1802 GB", "1.1803 GB"]
