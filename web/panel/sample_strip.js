// Sample images: a row per item, with its source and target first, then one image per step.

import { build, buildImage, KeyedRows, setHidden, setText } from "../elements.js";

export class SampleStrip {
  constructor({ t, getUrl }) {
    this.t = t;
    this.getUrl = getUrl; // name -> URL
    this.images = [];
    this.list = build("div", { class: "qel-samples" });
    this.rows = new KeyedRows(this.list, () => this.buildRow());
    this.none = build("p", { class: "qel-empty" });
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

  // A job's detail: its images, its files of latents, its settings.
  update({ pictures: images = [], samples = [], settings = {} }) {
    this.images = images;
    const isOff = settings["samples.every"] === 0;
    setText(this.none, this.t(isOff ? "samples.off" : samples.length ? "samples.latents" : "samples.none"));
    setHidden(this.none, images.length > 0);
    const items = new Map();
    for (const image of images) {
      if (!items.has(image.item)) items.set(image.item, []);
      items.get(image.item).push(image);
    }
    this.rows.show([...items], ([item]) => item);
  }

  buildRow() {
    const strip = build("div", { class: "qel-strip" });
    const title = build("div", { class: "qel-note" });
    const tiles = new KeyedRows(strip, (image) => this.buildTile(image));
    return {
      element: build("div", { class: "qel-sample-row" }, title, strip),
      update: ([item, images]) => {
        title.textContent = item;
        const before = strip.childElementCount;
        const order = { source: 0, target: 1, sample: 2 };
        const sorted = [...images].sort(
          (a, b) => order[a.kind] - order[b.kind] || (a.step ?? a.index ?? 0) - (b.step ?? b.index ?? 0)
        );
        tiles.show(sorted, (image) => image.name);
        if (strip.childElementCount > before) {
          requestAnimationFrame(() => (strip.scrollLeft = strip.scrollWidth)); // to the newest
        }
      },
    };
  }

  buildTile(image) {
    const text = this.describe(image);
    // The caption beside it says what it is.
    const thumbnail = buildImage({ src: this.getUrl(image.name), alt: "", loading: "lazy" });
    const open = () => this.view(image.name);
    return {
      element: build(
        "button",
        {
          type: "button",
          class: "qel-tile",
          "data-name": image.name,
          "data-kind": image.kind,
          onclick: open,
        },
        thumbnail,
        build("span", {}, text)
      ),
      update() {},
    };
  }

  describe({ kind, step }) {
    return kind === "sample" ? this.t("samples.step", { step }) : this.t(`samples.${kind}`);
  }

  view(name) {
    const image = this.images.find((one) => one.name === name);
    if (!image) return;
    this.viewed = name;
    this.image.src = this.getUrl(name);
    this.image.alt = this.describe(image);
    this.caption.textContent = `${image.item} · ${this.describe(image)}`;
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
