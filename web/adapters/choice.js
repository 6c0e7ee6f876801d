// Selects and sorts the entries to show. Pure functions of the entries.

export const VARIANTS = ["original", "2509", "2511", "text-to-image", "unknown"];
export const HEALTHS = ["healthy", "warning", "broken", "unknown", "pending"];
export const SORTS = ["date", "name", "favourite", "size", "rank", "health"];
export const NO_FILTER = {
  text: "",
  variant: "all",
  health: "all",
  isOurs: false,
  isFavourite: false,
  withOthers: false,
};

const SHOWN_STATES = new Set(["ok", "damaged", "reading"]);
const HEALTH_ORDER = ["broken", "warning", "unknown", "pending", "healthy", "none"];

/** "pending" until it is known, "none" for a file that is not examined. */
export function getHealth(entry) {
  if (entry.health) return entry.health.level;
  return entry.state === "ok" || entry.state === "reading" ? "pending" : "none";
}

export function getMaxRank(entry) {
  return Math.max(0, ...entry.ranks);
}

export function isForQwenImage(entry) {
  return SHOWN_STATES.has(entry.state);
}

function buildText(entry) {
  const ranks = entry.ranks.map((rank) => `rank ${rank}`);
  const words = [entry.name, entry.title, entry.key_format, entry.model];
  return [...words, ...entry.trigger_words, ...entry.variants, ...entry.kinds, ...ranks]
    .join(" ")
    .toLowerCase();
}

export function filterEntries(entries, filter) {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  return entries.filter((entry) => {
    if (!filter.withOthers && !isForQwenImage(entry)) return false;
    if (filter.isOurs && !entry.is_trained_here) return false;
    if (filter.isFavourite && !entry.is_favourite) return false;
    if (filter.health !== "all" && getHealth(entry) !== filter.health) return false;
    if (filter.variant === "unknown" && entry.variants.length) return false;
    if (!["all", "unknown"].includes(filter.variant) && !entry.variants.includes(filter.variant))
      return false;
    const text = words.length ? buildText(entry) : "";
    return words.every((word) => text.includes(word));
  });
}

const COMPARE = {
  name: () => 0,
  date: (a, b) => b.modified_at - a.modified_at,
  favourite: (a, b) => b.is_favourite - a.is_favourite,
  size: (a, b) => b.size_bytes - a.size_bytes,
  rank: (a, b) => getMaxRank(b) - getMaxRank(a),
  health: (a, b) => HEALTH_ORDER.indexOf(getHealth(a)) - HEALTH_ORDER.indexOf(getHealth(b)),
};

// Created once: localeCompare with options would create one for each comparison.
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

/** Newest, largest or worst first; names break ties. */
export function sortEntries(entries, sort, isReversed) {
  const compare = (a, b) => COMPARE[sort](a, b) || collator.compare(a.name, b.name);
  const sorted = [...entries].sort(compare);
  return isReversed ? sorted.reverse() : sorted;
}

export function countFilters(filter) {
  return ["variant", "health", "isOurs", "isFavourite", "withOthers"].filter(
    (name) => filter[name] !== NO_FILTER[name],
  ).length;
}
