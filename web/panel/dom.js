// Building and formatting. Texts go in as text nodes only: names, logs and metadata are not ours.

// h("button", { class: "qel-button", onclick: f, "aria-label": "…" }, "text", child, …)
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Leaves the page alone where nothing changed, so that selections and screen readers stay put.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// Rows by key in the order of `items`: made once, updated in place, removed with their item.
export class KeyedRows {
  constructor(parent, build) {
    this.parent = parent;
    this.build = build; // (item) => { element, update(item) }
    this.rows = new Map();
  }

  show(items, getKey) {
    const kept = new Set();
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const key = getKey(item);
      kept.add(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.build(item)));
      row.update(item);
      if (row.element === next) next = next.nextElementSibling;
      else this.parent.insertBefore(row.element, next);
    }
    for (const [key, row] of this.rows) {
      if (kept.has(key)) continue;
      row.element.remove();
      this.rows.delete(key);
    }
  }
}

export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const total = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor((total % 3600) / 60)];
  if (hours) return `${hours}:${String(minutes).padStart(2, "0")} h`;
  if (minutes) return `${minutes}:${String(total % 60).padStart(2, "0")} min`;
  return `${total} s`;
}

export function formatBytes(bytes) {
  if (!Number.isFinite(bytes)) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let [value, unit] = [bytes, 0];
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${value >= 100 || !unit ? Math.round(value) : value.toPrecision(3)} ${units[unit]}`;
}

// Four significant digits, as short as they can be told.
export function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(4)));
}

export function formatTime(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString() : "";
}
