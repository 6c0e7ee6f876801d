// Sample images: a row per item, with its source and target first, then one image per step.

import { build, buildImage, KeyedRows, setHidden, setText } from "../elements.js";
import { SampleViewer } from "./sample_viewer.js";

const NEAR = 8; // px from the end of a strip
const ORDER = { source: 0, target: 1, sample: 2 };

export class SampleStrip {
  constructor({ t, getUrl }) {
    this.t = t;
    this.getUrl = getUrl; // name -> URL
    this.sorted = []; // a row of images per item, in the order shown
    this.list = build("div", { class: "qel-samples" });
    this.rows = new KeyedRows(this.list, () => this.buildRow());
    this.none = build("p", { class: "qel-empty" });
    this.viewer = new SampleViewer({
      ...{ t, getUrl, getRows: () => this.sorted },
      describe: (image) => this.describe(image),
    });
    this.element = build(
      "section",
      {},
      build("h3", {}, t("samples.title")),
      this.none,
      this.list,
      this.viewer.element
    );
  }

  // A job's detail: its images, its files of latents, its settings.
  update({ pictures: images = [], samples = [], settings = {} }) {
    const isOff = settings["samples.every"] === 0;
    setText(this.none, this.t(isOff ? "samples.off" : samples.length ? "samples.latents" : "samples.none"));
    setHidden(this.none, images.length > 0);
    const items = new Map();
    for (const image of images) {
      if (!items.has(image.item)) items.set(image.item, []);
      items.get(image.item).push(image);
    }
    for (const row of items.values()) row.sort(compareImages);
    this.sorted = [...items.values()];
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
        // Follows the newest image only from the end: whoever looks at the source stays there.
        const isAtEnd = strip.scrollLeft + strip.clientWidth >= strip.scrollWidth - NEAR;
        tiles.show(images, (image) => image.name);
        if (before && isAtEnd && strip.childElementCount > before) {
          requestAnimationFrame(() => (strip.scrollLeft = strip.scrollWidth));
        }
      },
    };
  }

  buildTile(image) {
    const text = this.describe(image);
    // The caption beside it says what it is.
    const thumbnail = buildImage({ src: this.getUrl(image.name), alt: "", loading: "lazy" });
    const open = () => this.viewer.view(image.name);
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
}

function compareImages(a, b) {
  return ORDER[a.kind] - ORDER[b.kind] || (a.step ?? a.index ?? 0) - (b.step ?? b.index ?? 0);
}
