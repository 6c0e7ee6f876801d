// Dialogs before deleting a job, and before cloning it with other settings.

import { ask } from "../dialog.js";
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
// entered, problem: asked again with these changes, since they were refused.
export function askToClone(parent, job, t, entered = {}, problem = "") {
  const inputs = CLONE_FIELDS.map(([name, type]) => {
    const value = String(job.settings[name] ?? "");
    const step = type === "number" ? "any" : undefined;
    const shown = { type, name, value: String(entered[name] ?? value), step };
    const input = build("input", { ...shown, class: "qel-input", required: true });
    return { name, type, value, input };
  });
  const content = [
    build("p", { class: "qel-note" }, t("clone.text")),
    problem && build("p", { class: "qel-problem", role: "alert" }, problem),
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
