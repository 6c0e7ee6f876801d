// Numbers and names as people read them.

export function formatSize(bytes) {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
  if (bytes < 1e9) return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
  return `${(bytes / 1e9).toFixed(2)} GB`;
}

export function formatCount(number) {
  if (number < 1e6) return number.toLocaleString();
  return number < 1e9 ? `${(number / 1e6).toFixed(1)} M` : `${(number / 1e9).toFixed(2)} B`;
}

export function formatDate(seconds) {
  return new Date(seconds * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
}

export function formatNumber(number) {
  if (number === null || number === undefined) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  return size < 1e-2 || size >= 1e5 ? number.toExponential(1) : String(+number.toPrecision(3));
}

/** Folder and file of a name in the loaders' list, which Windows spells with backslashes. */
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
