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

/** Whether the user agrees to a deletion that cannot be undone; words: {title, text, confirm}. */
export function askToDelete(parent, { title, text, confirm }, t) {
  const buttons = { keep: t("dialog.keep"), confirm, danger: true };
  return ask(parent, title, build("p", {}, text), buttons);
}

/**
 * Lets a user choose one of the sets.
 *
 * @param current the name of the set chosen now, or any other text.
 * @param describe (set) => the line below its name.
 * @returns {name} of the chosen set, {edit: id} to open one or the list (null), or null.
 */
export function askForSet(parent, sets, current, describe, t) {
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
          {
            type: "button",
            class: "qel-set",
            "aria-current": isCalled(set, current) && "true",
            onclick: () => close({ name: set.name }),
          },
          build("span", { class: "qel-set-name" }, set.name),
          isCalled(set, current) && build("span", { class: "qel-note" }, t("pairs.current")),
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
    dialog.querySelector("[aria-current]")?.focus();
  });
}

// A graph may leave out the folder that holds the set: "my_pairs" for "input/my_pairs".
function isCalled({ name }, text) {
  return name === text || name.slice(name.indexOf("/") + 1) === text;
}
