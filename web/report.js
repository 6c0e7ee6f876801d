// Shows what a node reported (matched keys, side path or merge, warnings) on the node itself.
// A DOM widget, since canvas drawing does not exist in ComfyUI's Vue nodes.

import { buildLine, buildSummary, findFinding, readFindings } from "./findings.js";

const MIN_HEIGHT = 64; // px, about four lines
const NOTHING = readFindings(null);

export function createReportView(t) {
  const element = document.createElement("div");
  element.className = "qwen-edit-lora-report";
  element.setAttribute("role", "group"); // a status would be read out whole after each run
  element.setAttribute("aria-label", t("report.label"));
  element.tabIndex = 0;
  const view = {
    element,
    text: "",
    late: new Map(), // findings of later samplings, by the node that applied the LoRA
    shown: [],
    // aging: lines that theme.css hides once the node's live view shows that they are outdated
    show(text, state, found = NOTHING, aging = []) {
      view.text = text ?? "";
      view.shown = [text, state, found, aging];
      const late = new Map([...view.late.values()].map((finding) => [finding.text, finding]));
      const findings = [...found.findings, ...late.values()];
      const lines = (view.text || t("report.waiting")).split("\n");
      const matched = lines.map((line) => findFinding(line, findings));
      const unmatched = findings.filter((finding) => !matched.includes(finding));
      const summary = buildSummary({ ...found, findings }, t);
      element.replaceChildren(
        ...(summary ? [summary] : []),
        ...lines.map((line, index) => {
          const row = buildLine(line, matched[index]);
          if (aging.includes(line)) row.dataset.ages = "";
          return row;
        }),
        ...unmatched.map((finding) => buildLine(finding.text, finding)),
      );
      const color = late.size && state === "fine" ? "warning" : state;
      element.dataset.state = view.text ? color : "waiting";
    },
  };
  view.show("", "fine");
  return view;
}

export function addReportWidget(node, t) {
  const view = createReportView(t);
  const widget = node.addDOMWidget("report_view", "qwen_edit_lora_report", view.element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => view.text,
    setValue: () => {},
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false; // a report is not a setting: keep it out of saved workflows
  // A node's size is set before extensions add widgets.
  const [width, height] = node.computeSize();
  node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.showReport = (output) => {
    const text = output?.qwen_edit_lora_report?.[0];
    // Nodes that a sweep expands into report under its id; skip their reports.
    const source = output?.qwen_edit_lora_node?.[0];
    if (text === undefined || (source && source !== node.comfyClass)) return;
    // A fully cached sweep sends only the first lines of its report.
    if (view.text !== text && view.text.startsWith(`${text}\n`)) return;
    const state = output.qwen_edit_lora_warning?.[0] ? "warning" : "fine";
    // The same text again is a cached one, for which nothing was sampled anew.
    if (view.text !== text) view.late.clear();
    view.show(text, state, readFindings(output), output.qwen_edit_lora_aging);
  };
  node.showFinding = (source, finding) => {
    if (finding) view.late.set(source, finding);
    else view.late.delete(source);
    view.show(...view.shown);
  };
  // ComfyUI's own message says only that the node failed, and hides the reason behind a button.
  node.showError = (message) => view.show(message, "error");
  const previous = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    previous?.call(this, output, ...rest);
    this.showReport(output);
  };
  return view;
}
