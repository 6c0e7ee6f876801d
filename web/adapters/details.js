// Everything about one file: verdict, trigger words, facts, training, modules, metadata.

import { getHealth } from "./choice.js";
import { build, buildImage, icon, iconButton } from "../elements.js";
import { formatCount, formatDate, formatNumber, formatSize } from "../format.js";
import { formatVariants, splitName } from "./facts.js";
import { createStar, HEALTH_ICONS } from "./row.js";

const COPIED_MS = 1500;

export function createDetails({ t, getPreviewUrl, onload, onstar, ontrain, onclose, openJob }) {
  const element = build("section", { class: "qel-details", tabindex: "-1", hidden: true });

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      copyBySelection(text); // without https the browser offers no clipboard API
    }
    const old = [...button.childNodes];
    button.replaceChildren(icon("check"), t("adapters.copied"));
    setTimeout(() => button.replaceChildren(...old), COPIED_MS);
  }

  function copyButton(text, label) {
    const button = build("button", { type: "button", class: "qel-button" }, icon("copy"), label);
    button.addEventListener("click", () => copy(text, button));
    return button;
  }

  function section(title, ...children) {
    return build("div", { class: "qel-section" }, build("h4", {}, title), ...children);
  }

  function fold(title, note, isOpen, ...children) {
    return build(
      "details",
      { class: "qel-section qel-fold", open: isOpen },
      build("summary", {}, title, build("span", { class: "qel-note" }, note)),
      ...children,
    );
  }

  function definitions(pairs) {
    const filled = pairs.filter(([, value]) => value !== "" && value !== undefined);
    return build(
      "dl",
      { class: "qel-facts" },
      ...filled.flatMap(([name, value]) => [build("dt", {}, name), build("dd", {}, value instanceof Node ? value : String(value))]),
    );
  }

  function head(entry) {
    const [folder, file] = splitName(entry.name);
    const load = () => onload(entry);
    const actions = [copyButton(entry.name, t("adapters.copy_name"))];
    if (entry.state === "ok") {
      const properties = { type: "button", class: "qel-button qel-button-primary", onclick: load };
      actions.unshift(build("button", properties, icon("sign-in"), t("adapters.load")));
    }
    if (entry.is_ours && entry.state === "ok") {
      const train = () => ontrain(entry);
      const properties = { type: "button", class: "qel-button", onclick: train };
      actions.push(build("button", properties, icon("refresh"), t("adapters.train_again")));
    }
    if (entry.has_job) {
      const properties = { type: "button", class: "qel-button", onclick: () => openJob(entry.job_id) };
      actions.push(build("button", properties, icon("chart-line"), t("adapters.open_job")));
    }
    return [
      build(
        "header",
        { class: "qel-details-head" },
        build(
          "div",
          { class: "qel-details-title" },
          build("h3", {}, file.replace(/\.safetensors$/i, "")),
          build("div", { class: "qel-note qel-path" }, folder + file),
        ),
        createStar(entry, t, onstar),
        iconButton("times", t("adapters.back"), onclose),
      ),
      build("div", { class: "qel-actions" }, ...actions),
    ];
  }

  function verdict(entry, sentences) {
    const health = getHealth(entry);
    const messages = sentences?.length ? sentences : [entry.health?.sentence ?? entry.error];
    return build(
      "div",
      { class: `qel-verdict qel-verdict-${health}` },
      build(
        "div",
        { class: `qel-verdict-level qel-health-${health}` },
        icon(HEALTH_ICONS[health]),
        build("strong", {}, t(`adapters.health.${health}`)),
      ),
      ...messages.filter(Boolean).map((sentence) => build("p", {}, sentence)),
      ...(entry.state === "ok" ? entry.warnings : [])
        .filter((warning) => !messages.includes(warning))
        .map((warning) => build("p", {}, warning)),
    );
  }

  function preview(entry) {
    if (!entry.preview) return null;
    return buildImage({ class: "qel-preview", src: getPreviewUrl(entry), alt: "", loading: "lazy" });
  }

  function triggers(entry, beside) {
    const words = [...new Set([...entry.trigger_words, ...(beside?.trigger_words ?? [])])];
    if (!words.length) return null;
    const chips = words.map((word) => {
      const label = `${t("adapters.copy")}: ${word}`;
      const properties = { type: "button", class: "qel-chip", "aria-label": label, title: label };
      const chip = build("button", properties, icon("copy"), word);
      chip.addEventListener("click", () => copy(word, chip));
      return chip;
    });
    if (words.length > 1) chips.push(copyButton(words.join(", "), t("adapters.copy_all")));
    return section(t("adapters.triggers"), build("div", { class: "qel-chips" }, ...chips));
  }

  function facts(entry) {
    const alphas = entry.alphas.map((alpha) => formatNumber(alpha, 3)).join(", ");
    const rank = entry.ranks.join(", ");
    const base = formatVariants(entry, t) || t("adapters.variant.unknown");
    const isOk = entry.state === "ok";
    return section(
      t("adapters.facts"),
      definitions([
        [t("adapters.fact.title"), entry.title],
        [t("adapters.fact.model"), isOk ? "" : entry.model],
        [t("adapters.fact.base"), isOk ? base : ""],
        [t("adapters.fact.kinds"), entry.kinds.join(", ")],
        [t("adapters.fact.rank"), rank],
        [t("adapters.fact.alpha"), alphas],
        [t("adapters.fact.targets"), entry.targets],
        [t("adapters.fact.blocks"), entry.blocks],
        [t("adapters.fact.key_format"), entry.key_format],
        [t("adapters.fact.dtypes"), entry.dtypes.join(", ")],
        [t("adapters.fact.parameters"), isOk ? formatCount(entry.num_parameters) : ""],
        [t("adapters.fact.size"), formatSize(entry.size_bytes)],
        [t("adapters.fact.modified"), formatDate(entry.modified_at)],
      ]),
    );
  }

  // What other programs noted in files beside this one: text, whatever it holds.
  function notes({ beside }) {
    const source = beside.has_link
      ? build("a", { href: beside.source, target: "_blank", rel: "noopener noreferrer" }, beside.source)
      : beside.source;
    const pairs = ["title", "base_model", "strength", "notes", "description"].map((name) => [
      t(`adapters.beside.${name}`),
      beside[name],
    ]);
    const content = [
      definitions([...pairs, [t("adapters.beside.source"), source]]),
      ...beside.problems.map((problem) => build("p", { class: "qel-note" }, problem)),
      beside.files.length > 0 &&
        build("p", { class: "qel-note" }, t("adapters.beside.from", { files: beside.files.join(", ") })),
    ];
    const isEmpty = !beside.files.length && !beside.problems.length;
    return isEmpty ? null : section(t("adapters.beside"), ...content.filter(Boolean));
  }

  function training({ known }) {
    const pairs = Object.entries(known).map(([name, text]) => [t(`adapters.known.${name}`), text]);
    return pairs.length ? section(t("adapters.training"), definitions(pairs)) : null;
  }

  function tags(details) {
    if (!details.tags.length) return null;
    const chips = details.tags.map(([tag, count]) =>
      build(
        "span",
        { class: "qel-chip qel-chip-still" },
        tag,
        build("span", { class: "qel-note" }, count),
      ),
    );
    return section(t("adapters.tags"), build("div", { class: "qel-chips" }, ...chips));
  }

  function modules(details) {
    if (!details.modules.length) return null;
    const columns = ["name", "num_modules", "shape", "rank", "std", "effective_rank"];
    const show = {
      shape: (shape) => shape?.join(" × ") ?? "–",
      std: (std) => formatNumber(std, 3),
      effective_rank: (rank) => rank?.toFixed(1) ?? "–",
    };
    const cell = (row, column) => {
      const tag = column === "name" ? "th" : "td";
      const properties = column === "name" ? { scope: "row" } : {};
      return build(tag, properties, String((show[column] ?? String)(row[column])));
    };
    const headings = columns.map((name) => build("th", { scope: "col" }, t(`adapters.column.${name}`)));
    const body = details.modules.map((row) =>
      build("tr", {}, ...columns.map((column) => cell(row, column))),
    );
    const table = build(
      "table",
      {},
      build("thead", {}, build("tr", {}, ...headings)),
      build("tbody", {}, ...body),
    );
    const label = t("adapters.modules");
    const scroll = { class: "qel-scroll", tabindex: "0", role: "region", "aria-label": label };
    const note = t("adapters.modules_count", { n: details.num_modules });
    return fold(label, note, false, build("div", scroll, table));
  }

  function metadata(details) {
    const fields = details.metadata.flatMap(({ key, value, num_chars }) => [
      build("dt", {}, key),
      build(
        "dd",
        {},
        value,
        num_chars > value.length &&
          build("span", { class: "qel-note" }, t("adapters.cut", { n: num_chars })),
      ),
    ]);
    const note = t("adapters.fields_count", { n: details.num_fields });
    const content = fields.length
      ? build("dl", { class: "qel-metadata" }, ...fields)
      : build("p", { class: "qel-note" }, t("adapters.no_metadata"));
    return fold(t("adapters.metadata"), note, false, content);
  }

  return {
    element,
    /** Shows what the list already has, and everything once `details` have loaded. */
    show(entry, details) {
      // Sections the user has opened stay open when the file is updated.
      const open = [...element.querySelectorAll("details")].map((one) => one.open);
      const isSame = element.dataset.id === entry.id;
      const scroll = isSame ? element.scrollTop : 0;
      const hadFocus = element.contains(document.activeElement);
      element.hidden = false;
      element.dataset.id = entry.id;
      element.setAttribute("aria-label", t("adapters.details", { name: entry.name }));
      const parts = [...head(entry), preview(entry), verdict(entry, details?.sentences)];
      parts.push(triggers(entry, details?.beside), details && notes(details), facts(entry));
      if (details) {
        const rest = [training(details), tags(details), modules(details), metadata(details)];
        parts.push(...rest);
      }
      element.replaceChildren(...parts.filter(Boolean));
      if (isSame) {
        element.querySelectorAll("details").forEach((one, i) => (one.open = open[i] ?? false));
      }
      element.scrollTop = scroll;
      if (hadFocus) element.focus({ preventScroll: true }); // or Escape would not be heard here
    },
    showError(sentence) {
      element.append(build("p", { class: "qel-error", role: "alert" }, sentence));
    },
    hide() {
      element.hidden = true;
      delete element.dataset.id;
      element.replaceChildren();
    },
  };
}

function copyBySelection(text) {
  const area = build("textarea", { class: "qel-clipboard", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
