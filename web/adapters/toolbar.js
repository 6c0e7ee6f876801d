// Search, filters and order.

import { countFilters, HEALTHS, NO_FILTER, SORTS, VARIANTS } from "./choice.js";
import { build, icon, iconButton } from "../elements.js";

const SEARCH_DELAY = 120; // ms after the last key
const VIEW_KEY = "qwen_edit_lora.adapters_view"; // in localStorage: "grid" or "list"

export function createToolbar({ t, onchange, onrefresh, onview, ondown }) {
  let filter = { ...NO_FILTER };
  let sort = SORTS[0];
  let isReversed = false;
  let timer;

  const search = build("input", {
    type: "search",
    class: "qel-search",
    placeholder: t("adapters.search"),
    "aria-label": t("adapters.search"),
    spellcheck: "false",
  });
  const count = build("span", { class: "qel-note", role: "status" });
  const badge = build("span", { class: "qel-count-badge", hidden: true });

  function select(label, options, value, onpick) {
    const element = build(
      "select",
      { class: "qel-select", "aria-label": label },
      ...options.map(([id, text]) => build("option", { value: id }, text)),
    );
    element.value = value;
    element.addEventListener("change", () => onpick(element.value));
    return element;
  }

  function checkbox(label, onpick) {
    const input = build("input", { type: "checkbox" });
    input.addEventListener("change", () => onpick(input.checked));
    return [input, build("label", { class: "qel-check" }, input, label)];
  }

  function change(part) {
    filter = { ...filter, ...part };
    const active = countFilters(filter);
    badge.textContent = active;
    badge.hidden = !active;
    clear.disabled = !active;
    onchange();
  }

  const variants = VARIANTS.map((id) => [id, t(`adapters.variant.${id}`)]);
  const variant = select(
    t("adapters.variant"),
    [["all", t("adapters.variant.all")], ...variants],
    "all",
    (value) => change({ variant: value }),
  );
  const healths = HEALTHS.map((id) => [id, t(`adapters.health.${id}`)]);
  const health = select(
    t("adapters.health"),
    [["all", t("adapters.health.all")], ...healths],
    "all",
    (value) => change({ health: value }),
  );
  const [ours, oursLabel] = checkbox(t("adapters.trained_here"), (isOurs) => change({ isOurs }));
  const [starred, starredLabel] = checkbox(t("adapters.favourites"), (isFavourite) =>
    change({ isFavourite }),
  );
  const [others, othersLabel] = checkbox(t("adapters.other_models"), (withOthers) =>
    change({ withOthers }),
  );
  const clear = build(
    "button",
    { type: "button", class: "qel-button qel-clear", disabled: true },
    t("adapters.clear"),
  );
  clear.addEventListener("click", () => reset({ text: filter.text }));
  const panel = build(
    "div",
    { class: "qel-filters", hidden: true, role: "group", "aria-label": t("adapters.filters") },
    build("div", { class: "qel-filter-row" }, variant, health),
    build("div", { class: "qel-filter-row" }, starredLabel, oursLabel, othersLabel, clear),
  );
  const toggle = iconButton("filter", t("adapters.filters"), () => {
    panel.hidden = !panel.hidden;
    toggle.setAttribute("aria-expanded", String(!panel.hidden));
  });
  toggle.setAttribute("aria-expanded", "false");
  toggle.append(badge);
  const order = select(
    t("adapters.sort"),
    SORTS.map((id) => [id, t(`adapters.sort.${id}`)]),
    sort,
    (value) => {
      sort = value;
      onchange();
    },
  );
  order.classList.add("qel-order");
  const reverse = iconButton("sort-amount-down", t("adapters.reverse"), () => {
    isReversed = !isReversed;
    reverse.setAttribute("aria-pressed", String(isReversed));
    const name = isReversed ? "sort-amount-up" : "sort-amount-down";
    reverse.firstChild.className = icon(name).className;
    onchange();
  });
  reverse.setAttribute("aria-pressed", "false");
  const grid = iconButton("th-large", t("adapters.grid"), () => {
    showView(!isGrid());
    localStorage.setItem(VIEW_KEY, isGrid() ? "grid" : "list");
    onview(isGrid());
  });
  const isGrid = () => grid.getAttribute("aria-pressed") === "true";
  const showView = (on) => grid.setAttribute("aria-pressed", String(on));
  showView(localStorage.getItem(VIEW_KEY) === "grid");
  const refresh = iconButton("refresh", t("adapters.refresh"), onrefresh);

  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ text: search.value }), SEARCH_DELAY);
  });
  search.addEventListener("keydown", (event) => {
    event.stopPropagation(); // ComfyUI has shortcuts of its own
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    ondown();
  });

  function reset(kept = {}) {
    clearTimeout(timer);
    const next = { ...NO_FILTER, ...kept };
    [search.value, variant.value, health.value] = [next.text, next.variant, next.health];
    [ours.checked, others.checked] = [next.isOurs, next.withOthers];
    starred.checked = next.isFavourite;
    change(next);
  }

  const element = build(
    "div",
    { class: "qel-toolbar" },
    build(
      "div",
      { class: "qel-toolbar-row" },
      build("div", { class: "qel-search-box" }, icon("search"), search),
      toggle,
      refresh,
    ),
    panel,
    build("div", { class: "qel-toolbar-row" }, count, order, reverse, grid),
  );
  return {
    element,
    get filter() {
      return filter;
    },
    get isGrid() {
      return isGrid();
    },
    get sort() {
      return [sort, isReversed];
    },
    reset,
    setCount: (text) => {
      if (count.textContent !== text) count.textContent = text;
    },
    setBusy: (isBusy) => refresh.classList.toggle("qel-spin", isBusy),
    destroy: () => clearTimeout(timer),
  };
}
