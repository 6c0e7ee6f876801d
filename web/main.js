import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addReportWidget } from "./report.js";

// ComfyUI imports every .js file of this folder by itself; only this one registers anything.
const NODES_WITH_REPORT = new Set([
  "QwenEditLoraLoad",
  "QwenEditLoraApply",
  "QwenEditLoraStack",
  "QwenEditLoraSave",
  "QwenEditLoraInspect",
  "QwenEditLoraCompare",
  "QwenEditLoraResize",
  "QwenEditLoraMerge",
  "QwenEditLoraExtract",
  "QwenEditLoraSweep",
  "QwenEditLoraSweepGrid",
  "QwenEditLoraEffect",
  "QwenEditDataset",
  "QwenEditLoraTrain",
  "QwenEditLoraJob",
]);

// "5" is a node of the workflow itself, "<uuid of a subgraph>:5" one inside a subgraph.
function findNode(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(id);
}

// "5" is a node of the workflow itself, "3:5" node 5 inside the subgraph that node 3 stands for.
function findExecutedNode(id) {
  const path = String(id).split(":");
  const last = path.pop();
  const graph = path.reduce((g, step) => g?.getNodeById(step)?.subgraph, app.rootGraph);
  return graph?.getNodeById(last);
}

api.addEventListener("execution_error", ({ detail }) => {
  findExecutedNode(detail.node_id)?.showError?.(detail.exception_message.trim());
});

app.registerExtension({
  name: "qwen_edit_lora.report",

  nodeCreated(node) {
    if (NODES_WITH_REPORT.has(node.comfyClass)) addReportWidget(node);
  },

  // Outputs that come back with a reloaded page or from the history.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      if (output?.qwen_edit_lora_report !== undefined) findNode(locator)?.showReport?.(output);
    }
  },
});
