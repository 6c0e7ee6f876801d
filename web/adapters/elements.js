// Elements without HTML: names and metadata of files are a stranger's text.

/** An element with properties, and children that are elements or text. */
export function build(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child || child === 0)); // of `condition && child`
  return element;
}

/** One of ComfyUI's PrimeIcons, for the eye only. */
export function icon(name) {
  return build("i", { class: `pi pi-${name} qel-icon`, "aria-hidden": "true" });
}

export function iconButton(name, label, onclick, className = "") {
  const properties = { type: "button", class: `qel-icon-button ${className}`, onclick };
  return build("button", { ...properties, "aria-label": label, title: label }, icon(name));
}
