// The adapter browser: every file of the loras folders, to find, judge and put into the graph.

import { addLoadAndApply, getDropPosition } from "../graph.js";
import { filterEntries, isForQwenImage, sortEntries } from "./choice.js";
import { createDetails } from "./details.js";
import { build } from "../elements.js";
import { createList } from "./list.js";
import { askServer } from "../server.js";
import { createToolbar } from "./toolbar.js";

const ROUTE = "/qwen_edit_lora/adapters";
const EVENT = "qwen_edit_lora.adapters";
const JOB_EVENT = "qwen_edit_lora.job";
const DETAILS_DELAY = 150; // ms that an entry stays selected before its details are fetched

/**
 * @param app, api ComfyUI's own.
 * @param t (key, values) => text, for the keys of ../words/en.js.
 * @param openJob shows the training with this id.
 * @returns {{element: HTMLElement, destroy: () => void}}
 */
export function createAdapterBrowser({ app, api, t, openJob }) {
  /** Id -> entry. Entries are replaced, never mutated. */
  let entries = new Map();
  let pending = 0;
  let isLoaded = false;
  let failure = "";
  let shownId = null;
  let details = null;
  let timer;
  let loads = 0;
  const stops = new AbortController();

  const message = build("div", { class: "qel-message", hidden: true });
  const hint = build("div", { class: "qel-hint qel-note" }, t("adapters.drag_hint"));
  const progress = build("div", { class: "qel-pending qel-note", role: "status", hidden: true });
  const toolbar = createToolbar({
    t,
    onchange: () => {
      list.scrollToTop();
      draw();
    },
    onrefresh: load,
    onview: (isGrid) => list.setGrid(isGrid),
    ondown: () => {
      list.element.focus();
      list.activate(0);
    },
  });
  const getPreviewUrl = ({ id, preview }) => api.apiURL(`${ROUTE}/${id}/preview?v=${preview}`);
  const actions = { t, getPreviewUrl, onload: addToGraph, onstar: toggleStar };
  const list = createList({ ...actions, onselect: select, ondragstart, ondragend });
  list.setGrid(toolbar.isGrid);
  const view = createDetails({ ...actions, ontrain: trainAgain, onclose: close, openJob });
  const element = build(
    "div",
    { class: "qel-adapters", role: "region", "aria-label": t("adapters.label") },
    toolbar.element,
    progress,
    build(
      "div",
      { class: "qel-body" },
      build("div", { class: "qel-list-area" }, list.element, message, hint),
      view.element,
    ),
  );
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || shownId === null) return;
    event.stopPropagation();
    close();
  });

  // --- entries ---

  const fetchJson = (path, options) => askServer(api, path, options);

  async function load() {
    const number = ++loads;
    toolbar.setBusy(true);
    try {
      const answer = await fetchJson(ROUTE);
      if (number !== loads || stops.signal.aborted) return; // a later load is in progress
      const known = entries;
      // Keeps the object of an unchanged entry, so that its row is not redrawn.
      entries = new Map(
        answer.adapters.map((entry) => {
          const old = known.get(entry.id);
          return [entry.id, JSON.stringify(old) === JSON.stringify(entry) ? old : entry];
        }),
      );
      pending = answer.pending;
      isLoaded = true;
      failure = "";
    } catch (error) {
      if (number !== loads || stops.signal.aborted) return;
      failure = error.message;
    }
    toolbar.setBusy(false);
    draw();
    refreshDetails();
  }

  function take({ detail }) {
    for (const entry of detail.adapters) entries.set(entry.id, entry);
    for (const id of detail.gone) entries.delete(id);
    pending = detail.pending;
    draw();
    if (detail.adapters.some(({ id }) => id === shownId)) refreshDetails();
  }

  // --- display ---

  function draw() {
    const all = [...entries.values()];
    const shown = sortEntries(filterEntries(all, toolbar.filter), ...toolbar.sort);
    const { withOthers } = toolbar.filter;
    const total = withOthers ? all.length : all.filter(isForQwenImage).length;
    list.show(shown);
    toolbar.setCount(isLoaded ? t("adapters.count", { n: shown.length, total }) : "");
    progress.hidden = !pending;
    progress.textContent = pending ? t("adapters.pending", { n: pending }) : "";
    drawMessage(shown.length, total, all.length);
  }

  function drawMessage(numShown, total, numAll) {
    const parts = [];
    const button = (key, onclick) =>
      build("button", { type: "button", class: "qel-button", onclick }, t(key));
    if (failure) {
      const text = t("adapters.failed", { reason: failure });
      parts.push(build("p", { role: "alert" }, text), button("adapters.retry", load));
    } else if (!isLoaded) parts.push(build("p", {}, t("adapters.loading")));
    else if (!numAll) parts.push(build("p", {}, t("adapters.empty")));
    else if (!total) {
      parts.push(build("p", {}, t("adapters.empty_qwen", { total: numAll })));
      parts.push(button("adapters.show_others", () => toolbar.reset({ withOthers: true })));
    } else if (!numShown) {
      parts.push(build("p", {}, t("adapters.no_match")));
      parts.push(button("adapters.clear", () => toolbar.reset()));
    }
    const covers = parts.length > 0 && !(failure && numShown);
    message.hidden = !parts.length;
    message.classList.toggle("qel-message-strip", Boolean(failure && numShown));
    hint.hidden = list.element.hidden = covers;
    hint.hidden ||= shownId !== null;
    message.replaceChildren(...parts);
  }

  function select(entry) {
    if (shownId !== entry.id) details = null;
    shownId = entry.id;
    hint.hidden = true;
    element.classList.add("qel-has-details");
    view.show(entry, details);
    refreshDetails();
  }

  function close() {
    const hadFocus = view.element.contains(document.activeElement);
    shownId = details = null;
    clearTimeout(timer);
    element.classList.remove("qel-has-details");
    view.hide();
    list.deselect();
    draw();
    if (hadFocus) list.element.focus();
  }

  // Not for every file that the arrow keys pass.
  function refreshDetails() {
    clearTimeout(timer);
    if (shownId === null) return;
    if (!entries.has(shownId)) return close();
    timer = setTimeout(async () => {
      const id = shownId;
      try {
        const answer = await fetchJson(`${ROUTE}/${id}`);
        if (id !== shownId) return;
        details = answer;
        view.show(answer, answer);
      } catch (error) {
        if (id === shownId) view.showError(error.message);
      }
    }, DETAILS_DELAY);
  }

  // --- into the graph ---

  async function addToGraph(entry, position) {
    try {
      await addLoadAndApply(app, entry.name, position);
      const summary = t("adapters.loaded");
      app.extensionManager.toast.add({ severity: "success", summary, detail: entry.name, life: 2500 });
    } catch (error) {
      const summary = t("adapters.load_failed");
      app.extensionManager.toast.add({ severity: "error", summary, detail: error.message });
    }
  }

  function post(path, values = {}) {
    const headers = { "Content-Type": "application/json" };
    return fetchJson(path, { method: "POST", headers, body: JSON.stringify(values) });
  }

  async function toggleStar(entry) {
    try {
      const values = { favourite: !entry.is_favourite };
      const changed = await post(`${ROUTE}/${entry.id}/favourite`, values);
      take({ detail: { adapters: [changed], gone: [], pending } });
    } catch (error) {
      const summary = t("adapters.star_failed");
      app.extensionManager.toast.add({ severity: "error", summary, detail: error.message });
    }
  }

  async function trainAgain(entry) {
    const { toast } = app.extensionManager;
    try {
      const job = await post(`${ROUTE}/${entry.id}/train`);
      const summary = t("adapters.training_again", { name: job.name });
      toast.add({ severity: "success", summary, life: 4000 });
      openJob(job.id);
    } catch (error) {
      const summary = t("adapters.not_trained_again");
      toast.add({ severity: "error", summary, detail: error.message });
    }
  }

  let dragged = null;

  // With Vue nodes, other elements cover the canvas; all are in its container, except panels.
  function isOverCanvas({ target }) {
    if (element.contains(target) || !(target instanceof Element)) return false;
    if (target === app.canvas.canvas) return true;
    return Boolean(target.closest('[data-testid="transform-pane"], .dom-widget, .lg-node'));
  }

  function ondragover(event) {
    if (!isOverCanvas(event)) return;
    event.preventDefault();
    event.stopPropagation();
    event.dataTransfer.dropEffect = "copy";
  }

  function ondrop(event) {
    if (!isOverCanvas(event)) return;
    event.preventDefault(); // or a node's text field would insert the name
    event.stopPropagation();
    addToGraph(dragged, getDropPosition(app, event));
  }

  function ondragstart(event, entry) {
    dragged = entry;
    event.dataTransfer.effectAllowed = "copy";
    event.dataTransfer.setData("application/x-qwen-edit-lora", entry.name);
    document.addEventListener("dragover", ondragover, true);
    document.addEventListener("drop", ondrop, true);
  }

  function ondragend() {
    dragged = null;
    document.removeEventListener("dragover", ondragover, true);
    document.removeEventListener("drop", ondrop, true);
  }

  const onjob = ({ detail }) => detail?.status === "completed" && load();
  const listeners = [
    [EVENT, take],
    [JOB_EVENT, onjob],
    ["reconnected", load], // events are not resent
  ];
  for (const [name, listener] of listeners) api.addEventListener(name, listener);
  draw();
  load();

  return {
    element,
    destroy() {
      stops.abort();
      clearTimeout(timer);
      ondragend();
      for (const [name, listener] of listeners) api.removeEventListener(name, listener);
      toolbar.destroy();
      list.destroy();
      element.remove();
    },
  };
}
