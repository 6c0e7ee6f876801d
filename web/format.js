// Numbers, sizes and times for people: three significant digits, a unit that fits.

const UNITS = { en: ["s", "min", "h"], zh: ["秒", "分钟", "小时"] };

// Of dates and durations; undefined is the browser's.
let locale;

export function useLocale(name) {
  locale = name;
}

// Rounds to this many significant digits, in the shortest form.
export function formatNumber(number, digits = 3) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  if (number === 0) return "0";
  const rounded = Number(number.toPrecision(digits));
  const size = Math.abs(rounded);
  return size < 1e-4 || size >= 1e6 ? rounded.toExponential() : String(rounded);
}

export function formatSize(bytes, digits = 3) {
  if (!Number.isFinite(bytes)) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  for (; Number(bytes.toPrecision(digits)) >= 1000 && index < units.length - 1; index++) bytes /= 1000;
  return `${formatNumber(bytes, digits)} ${units[index]}`;
}

export function formatCount(number) {
  if (number < 1e6) return number.toLocaleString();
  return number < 1e9 ? `${formatNumber(number / 1e6)} M` : `${formatNumber(number / 1e9)} B`;
}

export function formatDate(seconds) {
  return new Date(seconds * 1000).toLocaleDateString(locale, { dateStyle: "medium" });
}

export function formatTime(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString(locale) : "";
}

// "0.251 s", "12 min", "3 h 20 min", "3 小时 20 分钟"
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const [s, min, h] = UNITS[locale?.split("-")[0]] ?? UNITS.en;
  const rest = Math.max(0, seconds);
  if (Number(rest.toPrecision(3)) < 60) return `${formatNumber(rest)} ${s}`;
  const minutes = Math.round(rest / 60);
  if (minutes < 60) return `${minutes} ${min}`;
  const hours = `${Math.floor(minutes / 60)} ${h}`;
  return minutes % 60 ? `${hours} ${minutes % 60} ${min}` : hours;
}
