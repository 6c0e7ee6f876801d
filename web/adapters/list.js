// A virtualized grid, of one file a row or of cards: only visible ones are in the page, so a thousand
// files scroll smoothly and only their images are loaded.

import { build } from "../elements.js";
import { createRow } from "./row.js";

export const ROW_HEIGHT = 56; // px; --qel-row-height in the style sheet
const OVERSCAN = 6; // rows above and below the visible ones
const MIN_CARD = 128; // px
const CARD_TEXT = 46; // px below the image
const GAP = 8; // px around cards

export function createList(options) {
  const { t, onselect, onload, onstar, ondragstart, ondragend } = options;
  const spacer = build("div", { class: "qel-list-spacer", role: "rowgroup" });
  const element = build(
    "div",
    { class: "qel-list", role: "grid", tabindex: "0", "aria-label": t("adapters.label") },
    spacer,
  );
  let entries = [];
  let activeId = null;
  let draggedId = null;
  /** Id -> [entry, row] of the rows in the page. */
  let rows = new Map();

  let isGrid = false;
  /** Columns, their width and height. */
  let layout = { columns: 1, width: 0, height: ROW_HEIGHT };

  function measure() {
    if (!isGrid) {
      layout = { columns: 1, width: 0, height: ROW_HEIGHT };
      return;
    }
    const room = (element.clientWidth || 300) - GAP;
    const columns = Math.max(1, Math.floor(room / (MIN_CARD + GAP)));
    const width = Math.floor(room / columns) - GAP;
    layout = { columns, width, height: width + CARD_TEXT + GAP };
  }

  function place(row, index) {
    const { columns, width, height } = layout;
    const [line, column] = [Math.floor(index / columns), index % columns];
    const x = isGrid ? GAP + column * (width + GAP) : 0;
    const y = line * height + (isGrid ? GAP : 0);
    row.style.transform = `translate(${x}px, ${y}px)`;
    row.style.width = isGrid ? `${width}px` : "";
    row.style.height = isGrid ? `${height - GAP}px` : "";
  }

  const getIndex = () => entries.findIndex((entry) => entry.id === activeId);

  function draw() {
    const height = element.clientHeight || 600;
    measure();
    const overscan = isGrid ? 1 : OVERSCAN;
    const first =
      Math.max(0, Math.floor(element.scrollTop / layout.height) - overscan) * layout.columns;
    const last =
      (Math.ceil((element.scrollTop + height) / layout.height) + overscan) * layout.columns;
    const shown = new Map();
    entries.slice(first, last).forEach((entry, i) => {
      const [known, row] = rows.get(entry.id) ?? [];
      const drawn = known === entry ? row : createRow(entry, options);
      place(drawn, first + i);
      drawn.setAttribute("aria-rowindex", first + i + 1);
      drawn.setAttribute("aria-selected", String(entry.id === activeId));
      shown.set(entry.id, [entry, drawn]);
    });
    for (const [id, [, row]] of rows) {
      if (shown.get(id)?.[1] === row) continue;
      // Removing the dragged row would end the drag.
      if (id === draggedId && !shown.has(id)) shown.set(id, rows.get(id));
      else row.remove();
    }
    for (const [, row] of shown.values()) if (row.parentNode !== spacer) spacer.append(row);
    rows = shown;
    element.setAttribute("aria-rowcount", entries.length);
    const lines = Math.ceil(entries.length / layout.columns);
    spacer.style.height = `${lines * layout.height + (isGrid ? GAP : 0)}px`;
    if (rows.has(activeId)) element.setAttribute("aria-activedescendant", `qel-adapter-${activeId}`);
    else element.removeAttribute("aria-activedescendant");
  }

  function reveal(index) {
    const top = Math.floor(index / layout.columns) * layout.height;
    if (top < element.scrollTop) element.scrollTop = top;
    const bottom = top + layout.height + (isGrid ? GAP : 0) - element.clientHeight;
    if (bottom > element.scrollTop) element.scrollTop = bottom;
  }

  function activate(index) {
    const entry = entries[Math.min(Math.max(index, 0), entries.length - 1)];
    if (!entry) return;
    activeId = entry.id;
    reveal(getIndex());
    draw();
    onselect(entry);
  }

  function findEntry(target) {
    const id = target.closest?.(".qel-row")?.dataset.id;
    return entries.find((entry) => entry.id === id);
  }

  element.addEventListener("scroll", draw, { passive: true });
  element.addEventListener("click", ({ target }) => {
    const entry = findEntry(target);
    if (entry) activate(entries.indexOf(entry));
  });
  element.addEventListener("dblclick", ({ target }) => {
    const entry = findEntry(target);
    if (entry?.state === "ok" && !target.closest("button")) onload(entry);
  });
  element.addEventListener("keydown", (event) => {
    const { columns } = layout;
    const page = Math.max(1, Math.floor(element.clientHeight / layout.height) - 1) * columns;
    const steps = { ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page };
    if (isGrid) Object.assign(steps, { ArrowRight: 1, ArrowLeft: -1 });
    const index = getIndex();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) activate(index < 0 ? 0 : index + steps[event.key]);
    else if (event.key === "Home") activate(0);
    else if (event.key === "End") activate(entries.length - 1);
    else if (event.key.toLowerCase() === "f" && index >= 0) onstar(entries[index]);
    else if (event.key === "Enter" && entries[index]?.state === "ok") onload(entries[index]);
    else return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI has shortcuts of its own
  });
  element.addEventListener("dragstart", (event) => {
    const entry = findEntry(event.target);
    if (entry?.state !== "ok") return event.preventDefault();
    draggedId = entry.id;
    ondragstart(event, entry);
  });
  element.addEventListener("dragend", (event) => {
    draggedId = null;
    ondragend(event);
    draw();
  });
  // The details open below and take up space; keeps the selected row in view.
  const observer = new ResizeObserver(() => {
    const index = getIndex();
    measure();
    if (index >= 0 && !element.hidden) reveal(index);
    draw();
  });
  observer.observe(element);

  return {
    element,
    /** Shows these entries; the active one stays active while it is among them. */
    show(newEntries) {
      entries = newEntries;
      const hasPreviews = entries.some((entry) => entry.preview);
      element.classList.toggle("qel-has-previews", hasPreviews);
      draw();
    },
    setGrid(on) {
      isGrid = on;
      element.classList.toggle("qel-cards", on);
      measure();
      if (getIndex() >= 0) reveal(getIndex());
      draw();
    },
    deselect() {
      activeId = null;
      draw();
    },
    activate,
    scrollToTop() {
      element.scrollTop = 0;
    },
    destroy: () => observer.disconnect(),
  };
}
