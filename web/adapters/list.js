// A virtualized grid of one file a row: only visible rows are in the page, so a thousand files scroll smoothly.

import { build } from "../elements.js";
import { createRow } from "./row.js";

export const ROW_HEIGHT = 56; // px; --qel-row-height in the style sheet
const OVERSCAN = 6; // rows above and below the visible ones

export function createList({ t, onselect, onload, ondragstart, ondragend }) {
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

  const getIndex = () => entries.findIndex((entry) => entry.id === activeId);

  function draw() {
    const height = element.clientHeight || 600;
    const first = Math.max(0, Math.floor(element.scrollTop / ROW_HEIGHT) - OVERSCAN);
    const last = Math.ceil((element.scrollTop + height) / ROW_HEIGHT) + OVERSCAN;
    const shown = new Map();
    entries.slice(first, last).forEach((entry, i) => {
      const [known, row] = rows.get(entry.id) ?? [];
      const drawn = known === entry ? row : createRow(entry, t, onload);
      drawn.style.transform = `translateY(${(first + i) * ROW_HEIGHT}px)`;
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
    spacer.style.height = `${entries.length * ROW_HEIGHT}px`;
    if (rows.has(activeId)) element.setAttribute("aria-activedescendant", `qel-adapter-${activeId}`);
    else element.removeAttribute("aria-activedescendant");
  }

  function reveal(index) {
    const top = index * ROW_HEIGHT;
    if (top < element.scrollTop) element.scrollTop = top;
    const bottom = top + ROW_HEIGHT - element.clientHeight;
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
    const page = Math.max(1, Math.floor(element.clientHeight / ROW_HEIGHT) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    const index = getIndex();
    if (event.key in steps) activate(index < 0 ? 0 : index + steps[event.key]);
    else if (event.key === "Home") activate(0);
    else if (event.key === "End") activate(entries.length - 1);
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
    if (index >= 0 && !element.hidden) reveal(index);
    draw();
  });
  observer.observe(element);

  return {
    element,
    /** Shows these entries; the active one stays active while it is among them. */
    show(newEntries) {
      entries = newEntries;
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
