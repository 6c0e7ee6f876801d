// Dialogs before deleting a job, and before cloning it with other settings.

import { build } from "../elements.js";

// Settings that a clone usually changes; everything else is copied.
const CLONE_FIELDS = [
  ["name", "text"],
  ["steps", "number"],
  ["lora.rank", "number"],
  ["optimizer.learning_rate", "number"],
  ["data.batch_size", "number"],
  ["seed", "number"],
];

const USABLE_BUTTON = "button:not(:disabled):not([hidden])";

// {with_adapter: boolean}, or null if cancelled.
export function askToDelete(parent, job, t) {
  const withAdapter = build("input", { type: "checkbox", name: "with_adapter" });
  const published = job.published ?? [];
  const content = [
    build("p", {}, t("delete.text", { name: job.name })),
    published.length
      ? build("label", { class: "qel-check" }, withAdapter, t("delete.withAdapter", { files: published.join(", ") }))
      : null,
  ];
  const buttons = { keep: t("dialog.keep"), confirm: t("delete.confirm"), danger: true };
  return ask(parent, t("delete.title"), content, buttons, () => ({
    with_adapter: withAdapter.checked,
  }));
}

export function askToCancel(parent, job, t) {
  const content = [build("p", {}, t("cancel.text", { name: job.name }))];
  const buttons = { keep: t("cancel.keep"), confirm: t("cancel.confirm") };
  return ask(parent, t("cancel.title"), content, buttons, () => ({}));
}

// {"optimizer.learning_rate": 1e-4, …}: the changes, possibly none; null if cancelled.
export function askToClone(parent, job, t) {
  const inputs = CLONE_FIELDS.map(([name, type]) => {
    const value = String(job.settings[name] ?? "");
    const input = build("input", {
      ...{ type, name, value, class: "qel-input", required: true },
      step: type === "number" ? "any" : undefined,
    });
    return { name, type, value, input };
  });
  const content = [
    build("p", { class: "qel-note" }, t("clone.text")),
    ...inputs.map(({ name, input }) =>
      build("label", { class: "qel-field" }, build("span", {}, t(`setting.${name}`)), input)
    ),
  ];
  const buttons = { keep: t("dialog.keep"), confirm: t("clone.confirm") };
  return ask(parent, t("clone.title", { name: job.name }), content, buttons, () =>
    Object.fromEntries(
      inputs
        .filter(({ input, value }) => input.value !== value)
        .map(({ name, type, input }) => [
          name,
          type === "number" ? Number(input.value) : input.value,
        ])
    )
  );
}

// Each button says what it does; `danger`: what it does cannot be taken back.
function ask(parent, title, content, { keep, confirm, danger = false }, read) {
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
    if (danger) keepButton.focus(); // not the tick that also deletes files
  });
}
