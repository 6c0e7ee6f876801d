// How much disk the encoded pairs take, and a button that removes what no training uses.

import { build, setHidden, setText } from "../elements.js";
import { formatSize } from "../format.js";
import { askToClean } from "./dialogs.js";

export class CacheBar {
  constructor({ client, t, onclean }) {
    Object.assign(this, { client, t, onclean });
    this.text = build("span", { class: "qel-note", role: "status" });
    this.button = build(
      "button",
      { type: "button", class: "qel-button", onclick: () => this.clean() },
      t("pairs.clean"),
    );
    this.element = build("div", { class: "qel-bar qel-cache" }, this.text, this.button);
    this.element.hidden = true;
  }

  async load() {
    try {
      this.show(await this.client.measureCache());
    } catch (error) {
      this.fail(error);
    }
  }

  show(cache) {
    this.freed = cache.freed_bytes;
    const sizes = { size: formatSize(cache.size_bytes), freed: formatSize(cache.freed_bytes) };
    setText(this.text, this.t("pairs.cache", sizes));
    setHidden(this.element, !cache.size_bytes);
    this.button.disabled = !cache.freed_bytes;
  }

  fail(error) {
    setText(this.text, error.message);
    setHidden(this.element, false);
    this.button.disabled = true;
  }

  async clean() {
    const text = this.t("pairs.clean_text", { freed: formatSize(this.freed) });
    if (!(await askToClean(this.element, text, this.t))) return;
    try {
      await this.client.cleanCache();
      this.onclean();
    } catch (error) {
      this.fail(error);
    }
  }
}
