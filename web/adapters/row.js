// One file as a row of the list, or as a card: the same parts, which the style sheet arranges.

import { getHealth } from "./choice.js";
import { build, buildImage, icon, iconButton } from "../elements.js";
import { formatSize } from "../format.js";
import { formatRank, splitName } from "./facts.js";

export const HEALTH_ICONS = {
  healthy: "check-circle",
  warning: "exclamation-triangle",
  broken: "times-circle",
  unknown: "question-circle",
  pending: "clock",
  none: "minus-circle",
};

/** Texts for the second line, most informative first. */
export function listFacts(entry, t) {
  if (entry.state === "reading") return [t("adapters.reading"), formatSize(entry.size_bytes)];
  if (entry.state !== "ok") {
    const state = {
      damaged: () => t("adapters.damaged"),
      "other model": () => t("adapters.other", { model: entry.model }),
      "unknown model": () => t("adapters.unknown_model"),
      "not opened": () => t("adapters.not_opened"),
    }[entry.state]();
    return [state, formatSize(entry.size_bytes)];
  }
  const kinds = entry.kinds.filter((kind) => kind !== "LoRA" && kind !== "diff");
  return [formatRank(entry, t), ...kinds, formatSize(entry.size_bytes), entry.key_format];
}

/** The star of a file; `onstar` is called with the entry. */
export function createStar(entry, t, onstar) {
  const press = (event) => {
    event.stopPropagation();
    onstar(entry);
  };
  const label = t(entry.is_favourite ? "adapters.unstar" : "adapters.star");
  const star = iconButton(entry.is_favourite ? "star-fill" : "star", label, press, "qel-star");
  star.setAttribute("aria-pressed", String(entry.is_favourite));
  return star;
}

function createThumbnail(entry, getPreviewUrl) {
  // The name beside it says whose it is.
  const image = entry.preview
    ? buildImage({ src: getPreviewUrl(entry), alt: "", loading: "lazy", draggable: "false" })
    : icon("image");
  return build("span", { class: "qel-thumb", role: "gridcell" }, image);
}

export function createRow(entry, { t, onload, onstar, getPreviewUrl }) {
  const health = getHealth(entry);
  const [folder, file] = splitName(entry.name);
  const stem = file.replace(/\.safetensors$/i, "");
  const facts = listFacts(entry, t).filter(Boolean);
  const healthText = t(`adapters.health.${health}`);
  const badges = [
    ...entry.variants.map((variant) =>
      build("span", { class: "qel-badge" }, t(`adapters.short.${variant}`)),
    ),
    entry.is_trained_here &&
      build("span", { class: "qel-badge qel-badge-ours" }, t("adapters.trained_here")),
  ];
  const row = build(
    "div",
    {
      class: entry.is_favourite ? "qel-row qel-starred" : "qel-row",
      role: "row",
      id: `qel-adapter-${entry.id}`,
      draggable: entry.state === "ok" ? "true" : "false",
      "data-id": entry.id,
      title: [entry.name, entry.health?.sentence ?? healthText].join("\n"),
    },
    build(
      "span",
      { class: `qel-health qel-health-${health}`, role: "gridcell" },
      icon(HEALTH_ICONS[health]),
      build("span", { class: "qel-spoken" }, healthText),
    ),
    createThumbnail(entry, getPreviewUrl),
    build(
      "span",
      { class: "qel-row-text", role: "gridcell" },
      build(
        "span",
        { class: "qel-row-name" },
        build("span", { class: "qel-row-stem" }, stem),
        folder && build("span", { class: "qel-row-folder" }, folder.replace(/[\\/]$/, "")),
      ),
      build(
        "span",
        { class: "qel-row-facts" },
        ...badges,
        build("span", { class: "qel-row-numbers" }, facts.join(" · ")),
      ),
    ),
  );
  const star = createStar(entry, t, onstar);
  star.tabIndex = -1; // F does the same; the list is a single tab stop
  const actions = [star];
  if (entry.state === "ok") {
    const load = (event) => {
      event.stopPropagation();
      onload(entry);
    };
    const button = iconButton("sign-in", t("adapters.load"), load, "qel-row-load");
    button.tabIndex = -1; // as does Enter
    actions.push(button);
  }
  row.append(build("span", { role: "gridcell", class: "qel-row-actions" }, ...actions));
  return row;
}
