// Sample images: a row per item, with its source and target first, then one image per step.

import { build, buildImage, KeyedRows, setHidden } from "../elements.js";

export class SampleStrip {
  constructor({ t, getUrl }) {
    this.t = t;
    this.getUrl = getUrl; // name -> URL
    this.pictures = [];
    this.list = build("div", { class: "qel-samples" });
    this.rows = new KeyedRows(this.list, () => this.buildRow());
    this.none = build("p", { class: "qel-empty" }, t("samples.none"));
    this.image = buildImage({ class: "qel-large" });
    this.caption = build("figcaption", {});
    this.dialog = build(
      "dialog",
      { class: "qel-dialog qel-viewer", "aria-label": t("samples.title") },
      build("figure", {}, this.image, this.caption),
      build(
        "div",
        { class: "qel-bar" },
        this.button("samples.previous", () => this.move(-1)),
        this.button("samples.next", () => this.move(1)),
        this.button("dialog.close", () => this.dialog.close())
      )
    );
    this.dialog.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "ArrowLeft") this.move(-1);
      if (event.key === "ArrowRight") this.move(1);
    });
    this.element = build(
      "section",
      {},
      build("h3", {}, t("samples.title")),
      this.none,
      this.list,
      this.dialog
    );
  }

  button(key, onclick) {
    return build("button", { type: "button", class: "qel-button", onclick }, this.t(key));
  }

  update(pictures = []) {
    this.pictures = pictures;
    setHidden(this.none, pictures.length > 0);
    const items = new Map();
    for (const picture of pictures) {
      if (!items.has(picture.item)) items.set(picture.item, []);
      items.get(picture.item).push(picture);
    }
    this.rows.show([...items], ([item]) => item);
  }

  buildRow() {
    const strip = build("div", { class: "qel-strip" });
    const title = build("div", { class: "qel-note" });
    const tiles = new KeyedRows(strip, (picture) => this.buildTile(picture));
    return {
      element: build("div", { class: "qel-sample-row" }, title, strip),
      update: ([item, pictures]) => {
        title.textContent = item;
        const before = strip.childElementCount;
        const order = { source: 0, target: 1, sample: 2 };
        const sorted = [...pictures].sort(
          (a, b) => order[a.kind] - order[b.kind] || (a.step ?? a.index ?? 0) - (b.step ?? b.index ?? 0)
        );
        tiles.show(sorted, (picture) => picture.name);
        if (strip.childElementCount > before) {
          requestAnimationFrame(() => (strip.scrollLeft = strip.scrollWidth)); // to the newest
        }
      },
    };
  }

  buildTile(picture) {
    const text = this.describe(picture);
    // The caption beside it says what it is.
    const image = buildImage({ src: this.getUrl(picture.name), alt: "", loading: "lazy" });
    const open = () => this.view(picture.name);
    return {
      element: build(
        "button",
        {
          type: "button",
          class: "qel-tile",
          "data-name": picture.name,
          "data-kind": picture.kind,
          onclick: open,
        },
        image,
        build("span", {}, text)
      ),
      update() {},
    };
  }

  describe({ kind, step }) {
    return kind === "sample" ? this.t("samples.step", { step }) : this.t(`samples.${kind}`);
  }

  view(name) {
    const picture = this.pictures.find((one) => one.name === name);
    if (!picture) return;
    this.viewed = name;
    this.image.src = this.getUrl(name);
    this.image.alt = this.describe(picture);
    this.caption.textContent = `${picture.item} · ${this.describe(picture)}`;
    if (!this.dialog.open) this.dialog.showModal();
  }

  // Moves along the row of the image shown.
  move(by) {
    const names = [...this.list.querySelectorAll(".qel-strip")]
      .map((strip) => [...strip.children].map((tile) => tile.dataset.name))
      .find((row) => row.includes(this.viewed));
    const next = names?.[names.indexOf(this.viewed) + by];
    if (next) this.view(next);
  }
}
