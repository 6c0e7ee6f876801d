// Questions about sets of pairs.

import { ask } from "../dialog.js";
import { build } from "../elements.js";

/** The text that a user enters, or null if they cancel. */
export async function askForText(parent, title, label, t, isLong) {
  const field = isLong
    ? build("textarea", { class: "qel-input qel-caption", rows: "4" })
    : build("input", { class: "qel-input", spellcheck: "false" });
  const content = build("label", { class: "qel-question" }, label, field);
  const buttons = { keep: t("dialog.keep"), confirm: t("pairs.apply"), focus: field };
  return (await ask(parent, title, content, buttons, () => field.value.trim())) || null;
}

/** Whether the user agrees to removing the encoded pairs that no training uses. */
export function askToClean(parent, text, t) {
  const content = build("p", {}, text);
  const buttons = { keep: t("dialog.keep"), confirm: t("pairs.clean_confirm"), danger: true };
  return ask(parent, t("pairs.clean_title"), content, buttons);
}

/**
 * Lets a user choose one of the sets.
 *
 * @param describe (set) => the line below its name.
 * @returns {name} of the chosen set, {edit: id} to open one or the list (null), or null.
 */
export function askForSet(parent, sets, describe, t) {
  return new Promise((resolve) => {
    const title = t("pairs.choose_title");
    const dialog = build("dialog", { class: "qel-dialog qel-choose", "aria-label": title });
    let answer = null;
    const close = (value) => {
      answer = value;
      dialog.close();
    };
    const rows = sets.map((set) =>
      build(
        "li",
        {},
        build(
          "button",
          { type: "button", class: "qel-set", onclick: () => close({ name: set.name }) },
          build("span", { class: "qel-set-name" }, set.name),
          build("span", { class: "qel-note" }, describe(set)),
        ),
        build(
          "button",
          {
            type: "button",
            class: "qel-button",
            "aria-label": t("pairs.edit_set", { name: set.name }),
            disabled: Boolean(set.problem),
            onclick: () => close({ edit: set.id }),
          },
          t("pairs.edit"),
        ),
      ),
    );
    const button = (key, value) =>
      build("button", { type: "button", class: "qel-button", onclick: () => close(value) }, t(key));
    dialog.append(
      build("h3", {}, title),
      rows.length ? build("ul", { class: "qel-choices" }, rows) : build("p", {}, t("pairs.none")),
      build(
        "div",
        { class: "qel-bar qel-end" },
        button("pairs.new", { edit: null }),
        button("dialog.close", null),
      ),
    );
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    parent.append(dialog);
    dialog.showModal();
  });
}
