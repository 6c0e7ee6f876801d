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
  return ask(parent, t("delete.title"), content, t("action.delete"), t, () => ({
    with_adapter: withAdapter.checked,
  }));
}

export function askToCancel(parent, job, t) {
  const content = [build("p", {}, t("cancel.text", { name: job.name }))];
  return ask(parent, t("cancel.title"), content, t("action.cancel"), t, () => ({}));
}

// {"optimizer.learning_rate": 1e-4, …}: the changes, possibly none; null if cancelled.
export function askToClone(parent, job, t) {
  const inputs = CLONE_FIELDS.map(([name, type]) => {
    const value = String(job.settings[name] ?? "");
    const step = type === "number" ? "any" : undefined;
    const input = build("input", { type, name, value, class: "qel-input", required: true, step });
    return { name, type, value, input };
  });
  const content = [
    build("p", { class: "qel-note" }, t("clone.text")),
    ...inputs.map(({ name, input }) =>
      build("label", { class: "qel-field" }, build("span", {}, t(`setting.${name}`)), input)
    ),
  ];
  return ask(parent, t("clone.title", { name: job.name }), content, t("action.clone"), t, () =>
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

function ask(parent, title, content, confirm, t, read) {
  return new Promise((resolve) => {
    const dialog = build("dialog", { class: "qel-dialog", "aria-label": title });
    const form = build(
      "form",
      { method: "dialog" },
      build("h3", {}, title),
      content,
      build(
        "div",
        { class: "qel-bar qel-end" },
        build("button", { class: "qel-button", type: "button", onclick: () => dialog.close() }, t("dialog.keep")),
        build("button", { class: "qel-button qel-button-primary", type: "submit", value: "yes" }, confirm)
      )
    );
    dialog.append(form);
    dialog.addEventListener("keydown", (event) => event.stopPropagation()); // keeps keys from the graph
    dialog.addEventListener("close", () => {
      const answer = dialog.returnValue === "yes" ? read() : null;
      dialog.remove();
      resolve(answer);
    });
    parent.append(dialog);
    dialog.showModal();
  });
}
