// How much disk something takes that can be removed, and a button that asks first.

import { build, setHidden, setText } from "../elements.js";
import { formatSize } from "../format.js";
import { askToDelete } from "./dialogs.js";

const CACHE_WORDS = {
  size: "pair_cache.size",
  button: "pair_cache.button",
  title: "pair_cache.title",
  text: "pair_cache.text",
  confirm: "pair_cache.confirm",
};
const TRASH_WORDS = {
  size: "pair_trash.size",
  button: "pair_trash.button",
  title: "pair_trash.title",
  text: "pair_trash.text",
  confirm: "pair_trash.confirm",
};

export class DiskBar {
  /**
   * @param words keys of {size, button, title, text, confirm}.
   * @param measure () => a promise of {isEmpty, isRemovable, values for the words}.
   * @param remove () => a promise.
   * @param onremoved called after it.
   */
  constructor({ t, words, measure, remove, onremoved }) {
    Object.assign(this, { t, words, measure, remove, onremoved });
    this.text = build("span", { class: "qel-note", role: "status" });
    this.button = build(
      "button",
      { type: "button", class: "qel-button", onclick: () => this.ask() },
      t(words.button),
    );
    this.element = build("div", { class: "qel-bar qel-disk" }, this.text, this.button);
    this.element.hidden = true;
  }

  async load() {
    try {
      const { isEmpty, isRemovable, values } = await this.measure();
      this.values = values;
      setText(this.text, this.t(this.words.size, values));
      setHidden(this.element, isEmpty);
      this.button.disabled = !isRemovable;
    } catch (error) {
      this.fail(error);
    }
  }

  fail(error) {
    setText(this.text, error.message);
    setHidden(this.element, false);
    this.button.disabled = true;
  }

  async ask() {
    await this.load(); // another page may have changed something since
    if (this.button.disabled) return;
    const { t, words } = this;
    const texts = { title: t(words.title), text: t(words.text, this.values), confirm: t(words.confirm) };
    if (!(await askToDelete(this.element, texts, t))) return;
    try {
      await this.remove();
      this.onremoved();
    } catch (error) {
      this.fail(error);
    }
  }
}

/** The encoded pairs that no training uses. */
export function createCacheBar({ client, t, onremoved }) {
  return new DiskBar({
    ...{ t, words: CACHE_WORDS, onremoved, remove: () => client.cleanCache() },
    async measure() {
      const { size_bytes: size, freed_bytes: freed } = await client.measureCache();
      const values = { size: formatSize(size), freed: formatSize(freed) };
      return { isEmpty: !size, isRemovable: freed > 0, values };
    },
  });
}

/** What was removed from the sets, or replaced. */
export function createTrashBar({ client, t, onremoved }) {
  return new DiskBar({
    ...{ t, words: TRASH_WORDS, onremoved, remove: () => client.emptyTrash() },
    async measure() {
      const { size_bytes: size, num_files: n } = await client.measureTrash();
      return { isEmpty: !size, isRemovable: size > 0, values: { size: formatSize(size), n } };
    },
  });
}
