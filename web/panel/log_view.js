// The worker's log, followed from its end as it grows.

import { build } from "../elements.js";

const MAX_CHARACTERS = 200_000; // kept in the page

export class LogView {
  constructor({ t, read, fail, url }) {
    this.read = read; // (offset or undefined) -> {text, next_offset}
    this.fail = fail;
    this.offset = undefined;
    this.isReading = false;
    const label = { tabindex: "0", "aria-label": t("log.title") };
    this.text = build("pre", { class: "qel-log", role: "log", "aria-live": "off", ...label });
    this.element = build(
      "details",
      { class: "qel-unfold" },
      build("summary", {}, t("log.title")),
      build("a", { class: "qel-button qel-log-link", href: url, download: "" }, t("log.download")),
      this.text
    );
    this.element.addEventListener("toggle", () => this.update());
  }

  async update() {
    if (!this.element.open || this.isReading) return;
    this.isReading = true;
    try {
      const { text, next_offset } = await this.read(this.offset);
      const follows =
        this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 8;
      this.offset = next_offset;
      if (text) {
        // Appended, so that a selection above is kept.
        this.text.append(text);
        const length = this.text.textContent.length;
        if (length > MAX_CHARACTERS) {
          this.text.textContent = this.text.textContent.slice(length - MAX_CHARACTERS / 2);
        }
      }
      if (follows) this.text.scrollTop = this.text.scrollHeight;
    } catch (error) {
      this.fail(error.message);
    } finally {
      this.isReading = false;
    }
  }
}
