// A button on the node Image Pairs: chooses a set for `folder`, whose field still takes any text.

import { PairClient } from "./client.js";
import { askForSet } from "./dialogs.js";
import { describeSet } from "./set_list.js";

/** @param openPairs (id) opens a set in the panel; null the list of all. */
export function addPairsButton(node, { app, api, t, openPairs }) {
  // After the widgets with values: their positions are what a saved workflow stores.
  const button = node.addWidget("button", "choose_pairs", null, () => void choose());
  button.label = t("pairs.choose");
  button.serialize = false;
  if (button.options) button.options.serialize = false;

  async function choose() {
    const describe = (set) => set.problem ?? describeSet(set, t);
    try {
      const sets = await new PairClient(api).list();
      const current = findFolder().value;
      const answer = await askForSet(document.body, sets, current, describe, t);
      if (answer?.edit !== undefined) await openPairs(answer.edit);
      else if (answer) setFolder(answer.name);
    } catch (error) {
      const summary = t("pairs.not_listed");
      app.extensionManager.toast.add({ severity: "error", summary, detail: error.message });
    }
  }

  function findFolder() {
    return node.widgets.find((one) => one.name === "folder");
  }

  function setFolder(name) {
    const widget = findFolder();
    const { graph } = node;
    graph?.beforeChange();
    widget.value = name;
    widget.callback?.(name, app.canvas, node);
    graph?.afterChange();
    app.canvas.setDirty(true, true);
  }
}
