// A pair's images, large and side by side, with a button to replace each.

import { build } from "../elements.js";
import { chooseFiles } from "./drop_zone.js";
import { buildPairImage } from "./pair_card.js";

const LARGE_SIDE = 1280; // px, of the server's thumbnails

export class PairViewer {
  /** @param put (pair, slot, file) => the pair as it is then, or null. */
  constructor({ client, setId, t, put }) {
    Object.assign(this, { client, setId, t, put });
    this.title = build("h3", {});
    this.figures = build("div", { class: "qel-pair-large" });
    this.caption = build("p", { class: "qel-note" });
    this.element = build(
      "dialog",
      { class: "qel-dialog qel-pair-viewer", "aria-label": t("pairs.viewer") },
      this.title,
      this.figures,
      this.caption,
      build(
        "div",
        { class: "qel-bar qel-end" },
        build(
          "button",
          { type: "button", class: "qel-button", onclick: () => this.element.close() },
          t("dialog.close"),
        ),
      ),
    );
    this.element.addEventListener("keydown", (event) => event.stopPropagation());
  }

  show(pair) {
    this.draw(pair);
    if (!this.element.open) this.element.showModal();
  }

  draw(pair) {
    this.title.textContent = pair.name;
    this.caption.textContent = pair.caption;
    const images = [pair.target, ...pair.references];
    // A focused button that is replaced would leave the focus, and Escape, to the page behind.
    const hadFocus = this.figures.contains(document.activeElement);
    this.figures.replaceChildren(
      ...images.map((image, slot) => image && this.buildFigure(pair, image, slot)).filter(Boolean),
    );
    if (hadFocus) this.figures.querySelector("button")?.focus();
  }

  buildFigure(pair, image, slot) {
    const { t } = this;
    const side = slot ? t("pairs.reference", { n: slot }) : t("pairs.target");
    const replace = () =>
      chooseFiles(
        async (files) => {
          const now = await this.put(pair, slot, files[0]);
          if (now) this.draw(now);
          else this.element.close(); // the page shows the message
        },
        { accept: "image/*" },
      );
    return build(
      "figure",
      {},
      buildPairImage(this.client.getImageUrl(this.setId, pair.id, image, LARGE_SIDE), t),
      build(
        "figcaption",
        { class: "qel-bar" },
        build("span", { class: "qel-note" }, `${side}: ${image.file}`),
        build(
          "button",
          {
            type: "button",
            class: "qel-button",
            "aria-label": t("pairs.replace_side", { side }),
            onclick: replace,
          },
          t("pairs.replace"),
        ),
      ),
    );
  }
}
