// Paints the mask of a pair over its target, in a dialog.

import { ask } from "../dialog.js";
import { build, setAttribute, setHidden, setText } from "../elements.js";
import { MaskCanvas } from "./mask_canvas.js";

const SIDE = 1280; // px, of the server's thumbnails; the server scales the mask to the target
const LARGEST_BRUSH = 0.5; // of the shorter side

export class MaskEditor {
  /** @param onsaved (answer) with the pair as it is then, and the token of what it replaced. */
  constructor({ client, setId, t, onsaved }) {
    Object.assign(this, { client, setId, t, onsaved });
    this.mask = new MaskCanvas({ label: t("mask.canvas"), onchange: () => this.update() });
    this.image = build("img", { class: "qel-mask-image", alt: "", draggable: "false" });
    this.stage = build(
      "div",
      { class: "qel-mask-stage" },
      this.image,
      this.mask.canvas,
      this.mask.cursor,
    );
    this.title = build("h3", {});
    this.problem = build("p", { class: "qel-problem", role: "alert", hidden: true });
    this.paint = this.button("mask.paint", () => this.choose(false));
    this.erase = this.button("mask.erase", () => this.choose(true));
    this.size = build("input", { type: "range", min: "1", class: "qel-slider" });
    this.size.addEventListener("input", () => (this.mask.brush = Number(this.size.value)));
    this.undo = this.button("pairs.undo", () => this.undoStroke());
    this.clear = this.button("mask.clear", () => this.mask.clear());
    this.save = this.button("mask.save", () => this.saveMask());
    this.save.classList.add("qel-button-primary");
    this.element = build(
      "dialog",
      { class: "qel-dialog qel-mask-editor", "aria-label": t("mask.title") },
      this.title,
      build("p", { class: "qel-note" }, t("mask.hint")),
      build(
        "div",
        { class: "qel-bar qel-mask-tools" },
        build(
          "div",
          { class: "qel-bar", role: "group", "aria-label": t("mask.tool") },
          this.paint,
          this.erase,
        ),
        build("label", { class: "qel-check" }, t("mask.size"), this.size),
        build("div", { class: "qel-bar" }, this.undo, this.clear),
      ),
      this.stage,
      this.problem,
      build(
        "div",
        { class: "qel-bar qel-end" },
        this.button("dialog.keep", () => this.leave()),
        this.save,
      ),
    );
    this.element.addEventListener("keydown", (event) => this.press(event));
    this.element.addEventListener("cancel", (event) => {
      event.preventDefault(); // Escape
      this.leave();
    });
  }

  button(key, onclick) {
    return build("button", { type: "button", class: "qel-button", onclick }, this.t(key));
  }

  async show(pair) {
    this.pair = pair;
    this.title.textContent = this.t("mask.of", { name: pair.name });
    this.report("");
    this.isReady = false;
    this.mask.start(1, 1, null);
    this.update();
    this.element.showModal();
    try {
      const { client, setId } = this;
      this.image.src = client.getImageUrl(setId, pair.id, pair.target, SIDE);
      const url = pair.mask && client.getMaskUrl(setId, pair.id, pair.mask, SIDE);
      const [mask] = await Promise.all([url ? load(url) : null, this.image.decode()]);
      if (this.pair !== pair || !this.element.open) return;
      const { naturalWidth: width, naturalHeight: height } = this.image;
      this.stage.style.setProperty("--qel-ratio", width / height);
      this.mask.start(width, height, mask);
      this.isReady = true;
      this.size.max = Math.max(2, Math.round(Math.min(width, height) * LARGEST_BRUSH));
      this.size.value = this.mask.brush = Math.max(1, Math.round(Math.min(width, height) / 10));
      this.choose(false);
      this.mask.canvas.focus();
    } catch {
      this.report(this.t("pairs.broken"));
    }
  }

  choose(isErasing) {
    this.mask.isErasing = isErasing;
    this.update();
  }

  update() {
    const { isErasing, isChanged } = this.mask;
    setAttribute(this.paint, "aria-pressed", !isErasing);
    setAttribute(this.erase, "aria-pressed", isErasing);
    this.undo.disabled = !isChanged;
    this.save.disabled = !isChanged || !this.isReady;
  }

  undoStroke() {
    this.mask.undo();
    if (this.undo.disabled) this.mask.canvas.focus(); // a disabled button loses it
  }

  report(text) {
    setText(this.problem, text);
    setHidden(this.problem, !text);
  }

  press(event) {
    event.stopPropagation(); // keeps keys from the graph
    if (event.key === "Escape") {
      event.preventDefault(); // a browser lets `cancel` keep a dialog open once only
      return this.leave();
    }
    const isUndo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
    if (isUndo && this.mask.isChanged) this.undoStroke();
    const step = { "[": -1, "]": 1 }[event.key];
    if (!step) return;
    const next = Math.round(this.mask.brush * (step > 0 ? 1.25 : 0.8)) + step;
    this.size.value = next; // within its limits
    this.mask.brush = Number(this.size.value);
  }

  // What is painted is not lost by a key.
  async leave() {
    if (this.mask.isChanged) {
      const content = build("p", {}, this.t("mask.discard_text"));
      const buttons = {
        keep: this.t("dialog.keep"),
        confirm: this.t("mask.discard"),
        danger: true,
      };
      if (!(await ask(this.element, this.t("mask.discard_title"), content, buttons))) return;
    }
    this.element.close();
  }

  async saveMask() {
    if (this.isBusy) return;
    this.isBusy = true; // not disabled: the focus would go to the page behind
    this.report("");
    const { client, setId, pair } = this;
    try {
      const answer = this.mask.isEmpty
        ? await client.removeMask(setId, pair.id)
        : await client.saveMask(setId, pair.id, await this.mask.toBlob());
      this.element.close();
      this.onsaved(answer);
    } catch (error) {
      this.report(error.message);
    }
    this.isBusy = false;
  }
}

async function load(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}
