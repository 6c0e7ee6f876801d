// Builds elements without HTML: names, logs and metadata of files are untrusted text.

/** An element with properties, and children that are elements or text. */
export function build(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  // Skips the null or false of `condition && child`.
  element.append(...children.flat().filter((child) => child || child === 0));
  return element;
}

/** One of ComfyUI's PrimeIcons, hidden from screen readers. */
export function icon(name) {
  return build("i", { class: `pi pi-${name} qel-icon`, "aria-hidden": "true" });
}

export function iconButton(name, label, onclick, className = "") {
  const properties = { type: "button", class: `qel-icon-button ${className}`, onclick };
  return build("button", { ...properties, "aria-label": label, title: label }, icon(name));
}

const RETRY_MS = 2000;

/**
 * An image that is asked for once more if it fails, and hidden if it fails again.
 * @param onfail (image): called then, for those that are not to keep their place.
 */
export function buildImage({ onfail, ...properties } = {}) {
  const image = build("img", properties);
  let failed = null; // the address that failed once
  image.addEventListener("load", () => (image.style.visibility = ""));
  image.addEventListener("error", () => {
    const address = image.getAttribute("src");
    image.style.visibility = "hidden"; // keeps its place, without the browser's broken-image icon
    if (!address) return;
    if (address === failed) return onfail?.(image);
    failed = address;
    setTimeout(() => {
      if (image.getAttribute("src") === address) image.src = address;
    }, RETRY_MS);
  });
  return image;
}

// Leaves the page alone if nothing changed, so that selections and screen readers keep their place.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// Rows by key in the order of `items`: created once, updated in place, removed with their item.
export class KeyedRows {
  constructor(parent, buildRow) {
    this.parent = parent;
    this.buildRow = buildRow; // (item) => { element, update(item) }
    this.rows = new Map();
  }

  show(items, getKey) {
    const kept = new Set();
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const key = getKey(item);
      kept.add(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.buildRow(item)));
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
