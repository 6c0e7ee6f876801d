import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addJobWidget } from "./job_view.js";
import { Jobs } from "./panel/jobs.js";
import { announce } from "./panel/notifications.js";
import { ProgressTitle } from "./panel/progress_title.js";
import { registerSidebar } from "./panel/sidebar.js";
import { addPairsButton } from "./pairs/node_button.js";
import { addReportWidget } from "./report.js";
import { addSwitches } from "./stack_switches.js";
import { createTranslator } from "./translation.js";

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

const NODES_WITH_JOB = new Set(["QwenEditLoraTrain", "QwenEditLoraJob"]);

// The browser of LoRA files listens to this while it is open.
api.addEventListener("qwen_edit_lora.adapters", () => {});
// What sampling found of a LoRA: its node ran before, and the finding is null once it is gone.
api.addEventListener("qwen_edit_lora.finding", ({ detail }) => {
  findExecutedNode(detail.node)?.showFinding?.(detail.source, detail.finding);
});
// Listens from the start: an event without a listener is an error in ComfyUI's console.
const jobs = new Jobs(api);
let sidebar = null;

// "5" is a node of the workflow itself, "<uuid of a subgraph>:5" one inside a subgraph.
function findNode(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(id);
}

// "5" is a node of the workflow itself, "3:5" is node 5 inside the subgraph of node 3.
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
    if (node.comfyClass === "QwenEditDataset") {
      const openPairs = (id) => sidebar?.showPairs(id);
      addPairsButton(node, { app, api, t: createTranslator(app), openPairs });
    }
    if (node.comfyClass === "QwenEditLoraStack") addSwitches(node, { t: createTranslator(app) });
    if (NODES_WITH_REPORT.has(node.comfyClass)) addReportWidget(node, { api, t: createTranslator(app) });
    if (NODES_WITH_JOB.has(node.comfyClass)) {
      addJobWidget(node, { app, jobs, showJob: (id) => sidebar?.showJob(id) });
    }
  },

  loadedGraphNode(node) {
    node.recallJob?.();
    node.measureReport?.(); // its saved size may be of a time with a shorter report
  },

  // Outputs restored with a reloaded page or from the history.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      if (output?.qwen_edit_lora_report !== undefined) findNode(locator)?.showReport?.(output);
      if (output?.qwen_edit_lora_job !== undefined) findNode(locator)?.showJob?.(output);
    }
  },
});

app.registerExtension({
  name: "qwen_edit_lora.panel",

  setup() {
    sidebar = registerSidebar({ app, api, jobs });
    announce(app, jobs, createTranslator(app));
    new ProgressTitle(jobs);
    jobs.refresh();
  },
});
