// A question in a dialog, from which the focus comes back.

import { build } from "./elements.js";

const USABLE_BUTTON = "button:not(:disabled):not([hidden])";

/**
 * Asks a question; each button says what it does.
 *
 * @param danger what `confirm` does cannot be taken back: it is red, and not the first choice.
 * @param focus the element to start in; by default the browser's choice, with `danger` the way out.
 * @returns what `read` returns when the user confirms, else null.
 */
export function ask(parent, title, content, options, read = () => true) {
  const { keep, confirm, danger = false, focus = null } = options;
  return new Promise((resolve) => {
    const opener = document.activeElement;
    const dialog = build("dialog", { class: "qel-dialog", "aria-label": title });
    const keepButton = build(
      "button",
      { class: "qel-button", type: "button", onclick: () => dialog.close() },
      keep
    );
    const kind = danger ? "qel-button-danger" : "qel-button-primary";
    const form = build(
      "form",
      { method: "dialog" },
      build("h3", {}, title),
      content,
      build(
        "div",
        { class: "qel-bar qel-end" },
        keepButton,
        build("button", { class: `qel-button ${kind}`, type: "submit", value: "yes" }, confirm)
      )
    );
    dialog.append(form);
    dialog.addEventListener("keydown", (event) => event.stopPropagation()); // keeps keys from the graph
    dialog.addEventListener("close", () => {
      const answer = dialog.returnValue === "yes" ? read() : null;
      dialog.remove();
      resolve(answer);
      // Later: the button that opened the dialog is disabled until its action has ended.
      setTimeout(() => {
        const isUsable = opener?.isConnected && !opener.disabled;
        (isUsable ? opener : parent.querySelector(USABLE_BUTTON))?.focus();
      }, 0);
    });
    parent.append(dialog);
    dialog.showModal();
    (focus ?? (danger ? keepButton : null))?.focus(); // not the tick that also deletes files
  });
}
