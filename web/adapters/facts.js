// A file's name and contents, as text.

/** Folder and file of a name in the loaders' list, which has backslashes on Windows. */
export function splitName(name) {
  const at = Math.max(name.lastIndexOf("/"), name.lastIndexOf("\\")) + 1;
  return [name.slice(0, at), name.slice(at)];
}

export function formatRank(entry, t) {
  if (!entry.ranks.length) return "";
  const low = Math.min(...entry.ranks);
  const high = Math.max(...entry.ranks);
  if (low === high) return t("adapters.rank", { n: low });
  return t("adapters.ranks", { low, high });
}

export function formatVariants(entry, t) {
  return entry.variants.map((variant) => t(`adapters.variant.${variant}`)).join(", ");
}
