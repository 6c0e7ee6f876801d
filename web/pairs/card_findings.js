// What the check says about a pair: the worst in two lines, all of it over the images on a click.

import { build, setAttribute, setHidden, setText } from "../elements.js";

export class CardFindings {
  constructor(t) {
    this.t = t;
    this.drawn = "[]";
    this.list = build("ul", { class: "qel-pair-findings", "aria-label": t("pairs.findings") });
    this.toggle = build("button", {
      type: "button",
      class: "qel-findings-toggle",
      "aria-expanded": "false",
      onclick: () => this.open(!this.isOpen),
    });
    this.element = build("div", { class: "qel-pair-report", hidden: true }, this.list, this.toggle);
    // Nothing to show where two lines hold it all.
    new ResizeObserver(() => this.fit()).observe(this.list);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isOpen) this.open(false);
    });
  }

  get isOpen() {
    return this.element.hasAttribute("data-open");
  }

  open(isOpen) {
    this.element.toggleAttribute("data-open", isOpen);
    setAttribute(this.toggle, "aria-expanded", isOpen);
    this.label();
  }

  fit() {
    const { scrollHeight, clientHeight } = this.list;
    const isWhole = !this.isOpen && this.count === 1 && scrollHeight <= clientHeight + 1;
    setHidden(this.toggle, isWhole);
  }

  label() {
    const { t, count: n } = this;
    const closed = n > 1 ? t("pairs.findings_all", { n }) : t("pairs.findings_whole");
    setText(this.toggle, this.isOpen ? t("pairs.findings_less") : closed);
  }

  /** @param found [{severity, kind, text}], the worst first. */
  show(found) {
    const drawn = JSON.stringify(found);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.count = found.length;
    const items = found.map(({ severity, kind, text }) =>
      build("li", { "data-severity": severity, "data-kind": kind }, capitalize(text)),
    );
    this.list.replaceChildren(...items);
    setHidden(this.element, !found.length);
    this.open(false);
    if (found.length) requestAnimationFrame(() => this.fit());
  }
}

function capitalize(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
