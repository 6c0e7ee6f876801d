// Sample images as a grid: a row per item, with its source and target first, then a column per step.

import { build, buildImage, KeyedRows, setAttribute, setHidden, setText } from "../elements.js";
import { arrange, findNeighbor } from "./sample_grid.js";
import { SampleViewer } from "./sample_viewer.js";

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class SampleStrip {
  // getUrl(name) -> URL of an image; archiveUrl: of all of them
  constructor({ t, getUrl, archiveUrl }) {
    Object.assign(this, { t, getUrl });
    this.cells = []; // rows of images as shown, null where an item lacks that step
    this.captions = {};
    this.chosen = null; // name of the image that Tab reaches
    this.list = build("div", { class: "qel-samples", role: "grid", "aria-label": t("samples.title") });
    this.rows = new KeyedRows(this.list, () => this.buildRow());
    this.none = build("p", { class: "qel-empty" });
    this.archive = build("a", { class: "qel-button", href: archiveUrl, download: "" }, t("samples.archive"));
    this.viewer = new SampleViewer({
      ...{ t, getUrl, getCells: () => this.cells },
      describe: (image) => this.describe(image),
      nameItem: (item) => this.nameItem(item),
    });
    this.element = build(
      "section",
      {},
      build("div", { class: "qel-bar" }, build("h3", {}, t("samples.title")), this.archive),
      this.none,
      this.list,
      this.viewer.element
    );
    this.list.addEventListener("keydown", (event) => this.press(event));
    this.list.addEventListener("focusin", ({ target }) => this.choose(target.dataset.name));
  }

  // A job's detail: its images and their captions, its files of latents, its settings.
  update({ pictures: images = [], captions = {}, samples = [], settings = {} }) {
    const isOff = settings["samples.every"] === 0;
    setText(this.none, this.t(isOff ? "samples.off" : samples.length ? "samples.latents" : "samples.none"));
    setHidden(this.none, images.length > 0);
    setHidden(this.list, !images.length);
    setHidden(this.archive, !images.length);
    this.captions = captions;
    const { columns, items } = arrange(images);
    this.cells = [...items.values()].map((row) => columns.map((key) => row.get(key) ?? null));
    const isAtEnd = this.list.scrollLeft + this.list.clientWidth >= this.list.scrollWidth - 8;
    const hasGrown = columns.length > (this.numColumns ?? 0);
    this.numColumns = columns.length;
    this.rows.show(
      [...items.keys()].map((item, index) => ({ item, columns, cells: this.cells[index] })),
      ({ item }) => item
    );
    const names = this.cells.flat().filter(Boolean);
    if (!names.some(({ name }) => name === this.chosen)) this.choose(names[0]?.name);
    // To the newest, unless someone looks at older ones.
    if (hasGrown && isAtEnd) requestAnimationFrame(() => (this.list.scrollLeft = this.list.scrollWidth));
  }

  buildRow() {
    const title = build("div", { class: "qel-sample-title", role: "rowheader" });
    const strip = build("div", { class: "qel-strip", role: "presentation" });
    const tiles = new KeyedRows(strip, () => this.buildCell());
    return {
      element: build("div", { class: "qel-sample-row", role: "row" }, title, strip),
      update: ({ item, columns, cells }) => {
        setText(title, this.nameItem(item));
        setAttribute(title, "title", this.nameItem(item));
        tiles.show(
          columns.map((key, index) => ({ key, image: cells[index] })),
          ({ key }) => key
        );
      },
    };
  }

  buildCell() {
    const element = build("div", { class: "qel-cell", role: "gridcell" });
    let shown = null;
    return {
      element,
      update: ({ image }) => {
        if ((image?.name ?? null) === shown) return;
        shown = image?.name ?? null;
        element.replaceChildren(...(image ? [this.buildTile(image)] : []));
      },
    };
  }

  buildTile(image) {
    // The caption below it says what it is.
    const thumbnail = buildImage({ src: this.getUrl(image.name), alt: "", loading: "lazy" });
    const properties = { type: "button", class: "qel-tile", tabindex: "-1" };
    const data = { "data-name": image.name, "data-kind": image.kind };
    const onclick = () => this.viewer.view(image.name);
    const text = build("span", {}, this.describe(image));
    return build("button", { ...properties, ...data, onclick }, thumbnail, text);
  }

  findTile(name) {
    return name ? this.list.querySelector(`[data-name="${CSS.escape(name)}"]`) : null;
  }

  // One of the tiles is reached by Tab, the others from there by the arrow keys.
  choose(name) {
    if (!name) return;
    this.findTile(this.chosen)?.setAttribute("tabindex", "-1");
    this.chosen = name;
    this.findTile(name)?.setAttribute("tabindex", "0");
  }

  press(event) {
    const move = MOVES[event.key];
    if (!move || !event.target.dataset.name) return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI has shortcuts of its own
    const next = findNeighbor(this.cells, event.target.dataset.name, ...move);
    const tile = this.findTile(next?.name);
    tile?.focus();
    tile?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  describe({ kind, step }) {
    return kind === "sample" ? this.t("samples.step", { step }) : this.t(`samples.${kind}`);
  }

  nameItem(item) {
    return this.captions[item] ?? item;
  }
}
