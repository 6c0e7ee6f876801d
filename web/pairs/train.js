// Opens the training workflow with a set's folder in it.

import { askServer } from "../server.js";

const TEMPLATE = "6 Train a LoRA";
const NODE_TYPE = "QwenEditDataset";

export async function openTrainingTemplate(app, api, folder) {
  const workflow = await askServer(api, getTemplateUrl());
  for (const node of workflow.nodes.filter(({ type }) => type === NODE_TYPE)) {
    const widgets = node.inputs.filter(({ widget }) => widget);
    node.widgets_values[widgets.findIndex(({ name }) => name === "folder")] = folder;
  }
  await app.loadGraphData(workflow, true, true, TEMPLATE);
}

function getTemplateUrl() {
  // The folder of custom_nodes that this file is served from, as it is written in URLs.
  const extension = new URL(import.meta.url).pathname.split("/extensions/")[1].split("/")[0];
  return `/workflow_templates/${extension}/${encodeURIComponent(TEMPLATE)}.json`;
}
