// Questions of a set's page.

import { build } from "../elements.js";

/** The text that a user enters, or null if they cancel. */
export function askForText(parent, title, label, t, isLong) {
  return new Promise((resolve) => {
    const field = isLong
      ? build("textarea", { class: "qel-input qel-caption", rows: "4" })
      : build("input", { class: "qel-input", spellcheck: "false" });
    const dialog = build("dialog", { class: "qel-dialog", "aria-label": title });
    dialog.append(
      build(
        "form",
        { method: "dialog" },
        build("h3", {}, title),
        build("label", { class: "qel-question" }, label, field),
        build(
          "div",
          { class: "qel-bar qel-end" },
          build(
            "button",
            { type: "button", class: "qel-button", onclick: () => dialog.close() },
            t("dialog.keep"),
          ),
          build(
            "button",
            { type: "submit", value: "yes", class: "qel-button qel-button-primary" },
            t("pairs.apply"),
          ),
        ),
      ),
    );
    const opener = document.activeElement;
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.addEventListener("close", () => {
      dialog.remove();
      opener?.focus?.();
      resolve(dialog.returnValue === "yes" ? field.value.trim() || null : null);
    });
    parent.append(dialog);
    dialog.showModal();
    field.focus();
  });
}
