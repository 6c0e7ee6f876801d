// One image of a training, large: beside its source or target under a slider, with its neighbors.

import { build, buildImage, setHidden } from "../elements.js";
import { findNeighbor } from "./sample_grid.js";

const MIDDLE = 50; // %

export class SampleViewer {
  // getCells() -> [[image or null, ...], ...] as shown: a row per item, a column per step;
  // describe(image) and nameItem(key) -> text
  constructor({ t, getUrl, getCells, describe, nameItem }) {
    Object.assign(this, { t, getUrl, getCells, describe, nameItem, viewed: null });
    this.image = buildImage({ class: "qel-large" });
    this.other = buildImage({ class: "qel-large qel-compared" });
    this.stage = build("div", { class: "qel-compare" }, this.image, this.other);
    this.caption = build("figcaption", {});
    this.choice = build("select", { class: "qel-select", onchange: () => this.compare() });
    this.choiceField = build("label", { class: "qel-check" }, t("samples.compare"), this.choice);
    this.slider = build("input", {
      ...{ type: "range", min: 0, max: 100, value: MIDDLE, class: "qel-slider" },
      ...{ "aria-label": t("samples.slider"), oninput: () => this.slide() },
    });
    this.neighbors = [
      this.button("samples.previous", () => this.move(0, -1)),
      this.button("samples.next", () => this.move(0, 1)),
    ];
    this.save = build("a", { class: "qel-button" }, t("samples.save"));
    this.element = build(
      "dialog",
      { class: "qel-dialog qel-viewer", "aria-label": t("samples.title") },
      build("figure", {}, this.stage, this.slider, this.caption),
      build(
        "div",
        { class: "qel-bar" },
        this.neighbors,
        this.choiceField,
        this.save,
        this.button("dialog.close", () => this.element.close())
      )
    );
    this.element.addEventListener("keydown", (event) => this.press(event));
  }

  button(key, onclick) {
    return build("button", { type: "button", class: "qel-button", onclick }, this.t(key));
  }

  view(name) {
    const image = this.getCells().flat().find((one) => one?.name === name);
    if (!image) return;
    this.viewed = name;
    this.image.src = this.getUrl(name);
    this.image.alt = this.describe(image);
    this.save.href = this.getUrl(name);
    this.save.download = name;
    this.caption.textContent = `${this.nameItem(image.item)} · ${this.describe(image)}`;
    this.offer(image);
    for (const button of this.neighbors) setHidden(button, this.getRows().flat().length < 2);
    if (!this.element.open) this.element.showModal();
  }

  // What the image can be compared with: the source and target of its item, and the step before.
  offer(image) {
    const row = this.findRow();
    const before = row[row.indexOf(image) - 1];
    const others = row.filter((one) => one !== image && one.kind !== "sample");
    if (before?.kind === "sample") others.push(before);
    const chosen = this.chosenKind;
    this.choice.replaceChildren(
      build("option", { value: "" }, this.t("samples.alone")),
      ...others.map((one) => build("option", { value: one.name }, this.describe(one)))
    );
    // Keeps comparing with the same kind from step to step and from item to item.
    this.choice.value = others.find((one) => one.kind === chosen)?.name ?? "";
    setHidden(this.choiceField, !others.length);
    this.compare(chosen);
  }

  compare(kind) {
    const other = this.findRow().find((one) => one.name === this.choice.value);
    this.chosenKind = kind ?? other?.kind;
    setHidden(this.other, !other);
    setHidden(this.slider, !other);
    if (!other) return;
    this.other.src = this.getUrl(other.name);
    this.other.alt = this.describe(other);
    this.slide();
  }

  slide() {
    this.stage.style.setProperty("--qel-at", `${this.slider.value}%`);
  }

  press(event) {
    event.stopPropagation(); // keeps keys from the graph
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const isTaken = event.target === this.slider || event.target === this.choice;
    if (!(event.key in moves) || isTaken) return;
    event.preventDefault();
    this.move(...moves[event.key]);
  }

  findRow() {
    const rows = this.getCells().map((row) => row.filter(Boolean));
    return rows.find((row) => row.some((one) => one.name === this.viewed)) ?? [];
  }

  // To another item (rows) or along the row (columns); past an end nothing happens.
  move(rows, columns) {
    const next = findNeighbor(this.getCells(), this.viewed, rows, columns);
    if (next) this.view(next.name);
  }
}
