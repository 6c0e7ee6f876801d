// Human-readable numbers, sizes and times.

export function formatSize(bytes) {
  if (!Number.isFinite(bytes)) return "";
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${Math.round(bytes / 1e3)} kB`;
  if (bytes < 1e9) return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
  return `${(bytes / 1e9).toFixed(2)} GB`;
}

export function formatCount(number) {
  if (number < 1e6) return number.toLocaleString();
  return number < 1e9 ? `${(number / 1e6).toFixed(1)} M` : `${(number / 1e9).toFixed(2)} B`;
}

// Rounds to this many significant digits, in the shortest form.
export function formatNumber(number, digits = 4) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  const rounded = Number(number.toPrecision(size < 1e-3 ? digits - 1 : digits));
  return size < 1e-3 || size >= 1e6 ? rounded.toExponential() : String(rounded);
}

export function formatDate(seconds) {
  return new Date(seconds * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
}

export function formatTime(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString() : "";
}

export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const total = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor((total % 3600) / 60)];
  if (hours) return `${hours}:${String(minutes).padStart(2, "0")} h`;
  if (minutes) return `${minutes}:${String(total % 60).padStart(2, "0")} min`;
  return `${total} s`;
}
