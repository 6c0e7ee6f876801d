// A switch in each row of Stack Qwen Edit LoRAs. What is off is kept as one text, `switched_off`,
// the node's last value: the values of older workflows keep their places.

const STORE = "switched_off";
const FILES = "files";
const ROW = /^files\.lora_(\d+)$/;

export function addSwitches(node, { t }) {
  const find = (name) => node.widgets.find((widget) => widget.name === name);
  const store = find(STORE);
  if (!store) return; // an older server
  store.hidden = true;
  store.options.hidden = true;
  const switches = new Map(); // row -> widget

  const readOff = () => new Set(String(store.value ?? "").split(",").map(Number).filter(Boolean));

  function flip(row, isOn) {
    const off = readOff();
    if (isOn) off.delete(row);
    else off.add(row);
    store.value = [...off].sort((a, b) => a - b).join(", ");
  }

  function buildSwitch(row) {
    const options = { serialize: false };
    const widget = node.addWidget("toggle", `on_${row}`, true, (on) => flip(row, on), options);
    widget.label = t("stack.row", { n: row });
    widget.tooltip = t("stack.switch");
    widget.serialize = false;
    return widget;
  }

  // The rows come and go with the number of files; a switch is above its row.
  function place() {
    const off = readOff();
    const rows = node.widgets.map(({ name }) => Number(ROW.exec(name)?.[1])).filter(Boolean);
    for (const [row, widget] of switches) {
      if (rows.includes(row)) continue;
      node.removeWidget(widget);
      switches.delete(row);
    }
    for (const row of rows) {
      if (!switches.has(row)) switches.set(row, buildSwitch(row));
      const widget = switches.get(row);
      const isOn = !off.has(row);
      if (widget.value !== isOn) widget.value = isOn;
      const file = find(`files.lora_${row}`);
      const at = node.widgets.indexOf(widget);
      if (node.widgets[at + 1] === file) continue;
      node.widgets.splice(at, 1);
      node.widgets.splice(node.widgets.indexOf(file), 0, widget);
    }
    const height = node.computeSize()[1];
    if (node.size[1] < height) node.setSize([node.size[0], height]);
  }

  const files = find(FILES);
  const { callback } = files;
  files.callback = function (...values) {
    callback?.apply(this, values);
    place();
  };
  const configured = node.onConfigure;
  node.onConfigure = function (...rest) {
    configured?.apply(this, rest);
    place();
  };
  // LiteGraph saves a value at its widget's position, and reads them without those not saved.
  const serialized = node.onSerialize;
  node.onSerialize = function (saved) {
    serialized?.call(this, saved);
    const values = saved.widgets_values;
    if (!values) return;
    saved.widgets_values = node.widgets.flatMap((widget, index) =>
      widget.serialize === false ? [] : [values[index] ?? null],
    );
  };
  place();
}
