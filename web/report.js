// Shows what a node reported (what to do, matched keys, warnings) on the node itself.
// A DOM widget, since canvas drawing does not exist in ComfyUI's Vue nodes.

import { build } from "./elements.js";
import { buildLine, buildSummary, findFinding, readFindings } from "./findings.js";
import { fitNode } from "./node_size.js";
import { SampleViewer } from "./panel/sample_viewer.js";

const NOTHING = readFindings(null);
const MARGIN = 20; // px, of both sides of a DOM widget in the classic renderer
const PADDING = 12; // px, of both sides of the box; see theme.css
const LINE = 17; // px
const MAX_TEXT = 300; // px; a longer report scrolls
const SEVERE = new Set(["warning", "error"]);
const COLUMNS = /\S {2,}\S/; // a row of a table, aligned by spaces

export function createReportView(t) {
  const element = build("div", {
    class: "qwen-edit-lora-report",
    role: "group", // a status would be read out whole after each run
    "aria-label": t("report.label"),
    tabindex: 0,
  });
  const content = build("div", { class: "qel-report-text" });
  const figures = build("details", {}, build("summary", {}, t("report.figures")));
  element.append(content);
  const view = {
    element,
    content,
    figures,
    text: "",
    late: new Map(), // findings of later samplings, by the node that applied the LoRA
    shown: [],
    // aging: lines that theme.css hides once the node's live view shows that they are outdated
    // numShown: lines before the figures, which are folded; what needs attention never is
    show(text, state, found = NOTHING, { aging = [], numShown = null, extras = [] } = {}) {
      view.text = text ?? "";
      view.shown = [text, state, found, { aging, numShown, extras }];
      const late = new Map([...view.late.values()].map((finding) => [finding.text, finding]));
      const findings = [...found.findings, ...late.values()];
      const lines = (view.text || t("report.waiting")).split("\n");
      const matched = lines.map((line) => findFinding(line, findings));
      const unmatched = findings.filter((finding) => !matched.includes(finding));
      const rows = lines.map((line, index) => {
        const row = buildLine(line, matched[index]);
        if (aging.includes(line)) row.dataset.ages = "";
        if (COLUMNS.test(line)) row.className = "qel-columns";
        return row;
      });
      const isFolded = (index) =>
        numShown !== null && index >= numShown && !SEVERE.has(matched[index]?.severity);
      const shown = rows.filter((_, index) => !isFolded(index));
      const folded = rows.filter((row, index) => isFolded(index) && row.textContent.trim());
      if (numShown !== null) shown[0].className = "qel-advice";
      const summary = buildSummary({ ...found, findings }, t);
      if (summary) shown.splice(numShown === null ? 0 : 1, 0, summary);
      figures.replaceChildren(figures.firstChild, ...folded);
      content.replaceChildren(
        ...shown,
        ...unmatched.map((finding) => buildLine(finding.text, finding)),
        ...extras,
        ...(folded.length ? [figures] : []),
      );
      const color = late.size && state === "fine" ? "warning" : state;
      element.dataset.state = view.text ? color : "waiting";
    },
    /** In px of the graph; a view that is out of sight has none. */
    measureText() {
      return Math.min(content.scrollHeight || LINE, MAX_TEXT) + PADDING;
    },
  };
  view.show("", "fine");
  return view;
}

export function addReportWidget(node, { api, t }) {
  const view = createReportView(t);
  // The live view of a training joins the report here: of two widgets, each would get half a node.
  const element = build("div", { class: "qel-node-view" }, view.element);
  let height = view.measureText();
  let hasImages = false;
  const measure = () => {
    if (view.content.scrollHeight) height = view.measureText();
    fitNode(node);
  };
  const getMinHeight = () => height + (node.jobView?.getHeight() ?? 0) + MARGIN;
  const widget = node.addDOMWidget("report_view", "qwen_edit_lora_report", element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => view.text,
    setValue: () => {},
    getMinHeight,
    getMaxHeight: () => (hasImages ? getMinHeight() : undefined), // the images get the rest
  });
  widget.serialize = false; // a report is not a setting: keep it out of saved workflows
  fitNode(node); // a node's size is set before extensions add widgets
  const observer = new ResizeObserver(measure);
  observer.observe(view.content);
  view.figures.addEventListener("toggle", measure); // in a box of fixed height nothing resizes
  node.measureReport = measure;
  const openLarge = addImageViewer(node, { api, t });
  node.showReport = (output) => {
    const text = output?.qwen_edit_lora_report?.[0];
    // Nodes that a sweep expands into report under its id; skip their reports.
    const source = output?.qwen_edit_lora_node?.[0];
    if (text === undefined || (source && source !== node.comfyClass)) return;
    // A fully cached sweep sends only the first lines of its report.
    if (view.text !== text && view.text.startsWith(`${text}\n`)) return;
    const state = output.qwen_edit_lora_warning?.[0] ? "warning" : "fine";
    const button = openLarge(output.images);
    hasImages = button !== null;
    element.classList.toggle("qel-fits", hasImages);
    // The same text again is a cached one, for which nothing was sampled anew.
    if (view.text !== text) view.late.clear();
    view.show(text, state, readFindings(output), {
      aging: output.qwen_edit_lora_aging,
      numShown: output.qwen_edit_lora_num_shown?.[0] ?? null,
      extras: button ? [button] : [],
    });
    measure();
  };
  node.showFinding = (source, finding) => {
    if (finding) view.late.set(source, finding);
    else view.late.delete(source);
    view.show(...view.shown);
    measure();
  };
  // ComfyUI's own message says only that the node failed, and hides the reason behind a button.
  node.showError = (message) => {
    view.show(message, "error");
    measure();
  };
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    executed?.call(this, output, ...rest);
    this.showReport(output);
  };
  const removed = node.onRemoved;
  node.onRemoved = function (...rest) {
    removed?.apply(this, rest);
    observer.disconnect();
  };
  return view;
}

/** Returns (images of an output) -> a button that opens them large, or null if there are none. */
function addImageViewer(node, { api, t }) {
  let images = []; // as ComfyUI names them
  let row = []; // the same for the viewer
  let viewer = null;
  const getUrl = (name) => {
    const { filename, subfolder, type } = images[Number(name)];
    return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  };
  const describe = ({ name }) => images[Number(name)].filename;
  const open = () => {
    if (!viewer) {
      viewer = new SampleViewer({ t, getUrl, getRows: () => [row], describe });
      viewer.element.setAttribute("aria-label", t("report.large"));
      viewer.element.addEventListener("close", () => viewer.element.remove());
    }
    document.body.append(viewer.element);
    viewer.view("0");
  };
  const button = build(
    "button",
    { type: "button", class: "qel-button qel-open-large", onclick: open },
    t("report.large"),
  );
  return (found) => {
    images = found ?? [];
    row = images.map((_, index) => ({ name: String(index), item: node.title, kind: "image" }));
    return images.length ? button : null;
  };
}
