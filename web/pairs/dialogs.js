// Questions about sets of pairs.

import { build } from "../elements.js";

/** The text that a user enters, or null if they cancel. */
export async function askForText(parent, title, label, t, isLong) {
  const field = isLong
    ? build("textarea", { class: "qel-input qel-caption", rows: "4" })
    : build("input", { class: "qel-input", spellcheck: "false" });
  const content = build("label", { class: "qel-question" }, label, field);
  const isSure = await ask(parent, title, content, t("pairs.apply"), t, field);
  return (isSure && field.value.trim()) || null;
}

/** Whether the user agrees to removing the encoded pairs that no training uses. */
export function askToClean(parent, text, t) {
  const content = build("p", {}, text);
  return ask(parent, t("pairs.clean_title"), content, t("pairs.clean_confirm"), t);
}

function ask(parent, title, content, confirm, t, field) {
  return new Promise((resolve) => {
    const dialog = build("dialog", { class: "qel-dialog", "aria-label": title });
    const no = build(
      "button",
      { type: "button", class: "qel-button", onclick: () => dialog.close() },
      t("dialog.keep"),
    );
    const yes = build(
      "button",
      { type: "submit", value: "yes", class: "qel-button qel-button-primary" },
      confirm,
    );
    const buttons = build("div", { class: "qel-bar qel-end" }, no, yes);
    dialog.append(build("form", { method: "dialog" }, build("h3", {}, title), content, buttons));
    const opener = document.activeElement;
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.addEventListener("close", () => {
      dialog.remove();
      opener?.focus?.();
      resolve(dialog.returnValue === "yes");
    });
    parent.append(dialog);
    dialog.showModal();
    (field ?? no).focus();
  });
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
