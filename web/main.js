import { app } from "../../scripts/app.js";
import { addReportWidget } from "./report.js";

// ComfyUI imports every .js file of this folder by itself; only this one registers anything.
const NODES_WITH_REPORT = new Set([
  "QwenEditLoraLoad",
  "QwenEditLoraApply",
  "QwenEditLoraStack",
  "QwenEditLoraSave",
]);

app.registerExtension({
  name: "qwen_edit_lora.report",

  nodeCreated(node) {
    if (NODES_WITH_REPORT.has(node.comfyClass)) addReportWidget(node);
  },

  // Outputs that come back with a reloaded page or from the history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      if (output?.qwen_edit_lora_report === undefined) continue;
      app.graph?.getNodeById?.(Number(id))?.showReport?.(output);
    }
  },
});
