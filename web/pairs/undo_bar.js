// The last change of a set in words, with a button that undoes it; then the one before.

import { build, setAttribute, setHidden, setText } from "../elements.js";

const TIME = 30_000; // ms that it is shown

export class UndoBar {
  /** @param undo (token) => a promise of whether it is done; else it can be tried again. */
  constructor({ t, undo }) {
    Object.assign(this, { undo });
    /** {token, text} of the changes made on this page, the last one last. */
    this.changes = [];
    this.text = build("span", { class: "qel-undo-text" });
    this.button = build(
      "button",
      { type: "button", class: "qel-button", onclick: () => this.undoLast() },
      t("pairs.undo"),
    );
    this.element = build(
      "div",
      { class: "qel-undo", role: "status", hidden: true },
      this.text,
      this.button,
    );
  }

  destroy() {
    clearTimeout(this.timer);
  }

  /** Does nothing for a change that took nothing away: its token is empty. */
  push(token, text) {
    if (!token) return;
    this.changes.push({ token, text });
    this.show();
  }

  show() {
    const { text } = this.changes.at(-1);
    setText(this.text, text);
    setAttribute(this.text, "title", text);
    setHidden(this.element, false);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => setHidden(this.element, true), TIME);
  }

  async undoLast() {
    clearTimeout(this.timer);
    setHidden(this.element, true);
    const change = this.changes.pop();
    if (!(await this.undo(change.token))) this.keep(change);
    if (this.changes.length) this.show();
  }

  // Refused twice, it waits behind the others: it may never be possible again.
  keep(change) {
    if (change.isRefused) this.changes.unshift(change);
    else this.changes.push(change);
    change.isRefused = true;
  }
}
