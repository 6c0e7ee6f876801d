// A node as high as what it shows: it grows with its report, and shrinks back when that folds.

const grown = new WeakMap(); // node -> { before, after }: heights around the growth

/** Makes the node high enough for its widgets; takes back only what it added itself. */
export function fitNode(node) {
  if (window.LiteGraph.vueNodesMode) return; // Vue nodes are as high as their elements
  const [width, needed] = node.computeSize();
  const height = node.size[1];
  const { before, after } = grown.get(node) ?? { before: height, after: height };
  if (height === after && before < height) resize(node, width, Math.max(before, needed), before);
  else if (height < needed) resize(node, width, needed, height);
  node.setDirtyCanvas?.(true, true); // its widgets share the height anew
}

function resize(node, width, height, before) {
  if (height === node.size[1]) return;
  node.setSize?.([Math.max(node.size[0], width), height]);
  grown.set(node, { before, after: height });
}
