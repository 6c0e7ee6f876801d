// Adds nodes to the user's graph. Works on litegraph's model, which both node renderers show.

import { say } from "./translation.js";

const GAP = 60; // px of the graph between the two nodes
const STEP = 40; // offset of a pair from one at the same position
const GRIP = 20; // from a node's left edge to the pointer that drops it

function toGraph(app, clientX, clientY) {
  // Not by the canvas element's own size: with Vue nodes other elements cover it.
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const { offset, scale } = app.canvas.ds;
  return [(clientX - left) / scale - offset[0], (clientY - top) / scale - offset[1]];
}

/** Graph position that centers a title bar on a mouse or drag event. */
export function getDropPosition(app, event) {
  const [x, y] = toGraph(app, event.clientX, event.clientY);
  return [x - GRIP, y + window.LiteGraph.NODE_TITLE_HEIGHT / 2];
}

// The center of the canvas area not covered by panels; if occupied, below the nodes there if that
// is visible, otherwise slightly offset.
function findFreePosition(app, graph, width, height) {
  const panel = document.querySelector(".graph-canvas-panel") ?? app.canvas.canvas;
  const area = panel.getBoundingClientRect();
  const [x, y] = toGraph(app, area.left + area.width / 2, area.top + area.height / 2);
  const [, bottom] = toGraph(app, area.left, area.bottom);
  const title = window.LiteGraph.NODE_TITLE_HEIGHT;
  const left = x - width / 2;
  const beside = graph._nodes
    .map(({ pos: [start, top], size: [w, h] }) => ({
      left: start,
      right: start + w,
      top: top - title,
      end: top + h,
    }))
    .filter((node) => node.left < left + width && node.right > left);
  const start = y - height / 2;
  let top = start;
  const covers = (node) => node.top < top + height && node.end > top - title;
  for (let node; (node = beside.find(covers)); ) top = node.end + GAP / 2 + title;
  if (top + height <= bottom) return [left, top];
  const position = [left, start];
  while (graph._nodes.some(({ pos }) => Math.hypot(pos[0] - position[0], pos[1] - position[1]) < 9))
    position.forEach((_, i) => (position[i] += STEP));
  return position;
}

function createNode(type) {
  const node = window.LiteGraph.createNode(type);
  if (!node) throw new Error(say("server.no_node", { type }));
  return node;
}

function findWidget(node, name) {
  return node.widgets.find((widget) => widget.name === name);
}

function offers(node, loraName) {
  const { values } = findWidget(node, "lora_name").options;
  return (typeof values === "function" ? values() : values ?? []).includes(loraName);
}

function setFile(app, load, loraName) {
  const widget = findWidget(load, "lora_name");
  widget.value = loraName;
  widget.callback?.(loraName, app.canvas, load);
}

// A wired Load node whose file ComfyUI does not have, as in a template just opened.
async function findLoaderWithoutFile(app, graph) {
  const loaders = graph._nodes.filter(
    (node) => node.comfyClass === "QwenEditLoraLoad" && node.outputs.some((one) => one.links?.length)
  );
  if (!loaders.length) return null;
  await app.refreshComboInNodes(); // a file may be newer than the page
  return loaders.find((load) => !offers(load, findWidget(load, "lora_name").value)) ?? null;
}

// The Load node under the pointer of a drop.
async function findLoaderAt(app, graph, [x, y], loraName) {
  const node = graph.getNodeOnPos(x + GRIP, y - window.LiteGraph.NODE_TITLE_HEIGHT / 2);
  if (node?.comfyClass !== "QwenEditLoraLoad") return null;
  if (!offers(node, loraName)) await app.refreshComboInNodes(); // the file is newer than the page
  return node;
}

/**
 * Adds Load Qwen Edit LoRA wired to Apply Qwen Edit LoRA to the open graph, as one undo step.
 *
 * @param loraName the file's name in the loaders' list.
 * A Load node at the position gets the file instead; without a position, a wired one whose file is
 * missing does.
 *
 * @param position of the pair in the graph; defaults to the center of the visible canvas.
 * @returns {{load, apply}} the nodes; apply is null if none was added.
 */
export async function addLoadAndApply(app, loraName, position) {
  const { canvas } = app;
  const graph = canvas.graph ?? app.graph;
  const waiting = position
    ? await findLoaderAt(app, graph, position, loraName)
    : await findLoaderWithoutFile(app, graph);
  if (waiting) {
    canvas.emitBeforeChange();
    graph.beforeChange();
    setFile(app, waiting, loraName);
    graph.afterChange();
    canvas.emitAfterChange();
    canvas.selectItems([waiting]);
    canvas.setDirty(true, true);
    return { load: waiting, apply: null };
  }
  let load = createNode("QwenEditLoraLoad");
  if (!offers(load, loraName)) {
    await app.refreshComboInNodes(); // the file is newer than the page
    load = createNode("QwenEditLoraLoad");
  }
  const apply = createNode("QwenEditLoraApply");
  const width = load.size[0] + GAP + apply.size[0];
  const height = Math.max(load.size[1], apply.size[1]);
  const [x, y] = position ?? findFreePosition(app, graph, width, height);
  canvas.emitBeforeChange();
  graph.beforeChange();
  try {
    load.pos = [x, y];
    apply.pos = [x + load.size[0] + GAP, y];
    graph.add(load);
    graph.add(apply);
    setFile(app, load, loraName);
    load.connect(load.findOutputSlot("adapter"), apply, apply.findInputSlot("adapter"));
    canvas.selectItems([load, apply]);
  } finally {
    graph.afterChange();
    canvas.emitAfterChange();
  }
  canvas.setDirty(true, true);
  return { load, apply };
}
