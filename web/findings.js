// A node's findings, as data beside its report: kind, severity, text, count.

import { build } from "./elements.js";

// How each severity looks is in theme.css: an icon and an edge in its color, never the text itself,
// which could not be read in one of the themes.
const SEVERITIES = ["error", "warning", "note"];

/** The findings of a node's output; null where the server sends none. */
export function readFindings(output) {
  const pairs = output?.qwen_edit_lora_pairs?.[0] ?? null;
  return { findings: output?.qwen_edit_lora_findings ?? [], pairs };
}

/** The finding on a line of the report, if any. The server puts its text there unchanged. */
export function findFinding(line, findings) {
  return findings.find((finding) => finding.text && line.endsWith(finding.text));
}

/** "4 of 5 pairs · 1 warning · 2 notes", or null if there is nothing to report. */
export function buildSummary({ findings, pairs }, t) {
  const parts = [];
  if (pairs) {
    const all = { n: pairs.num_pairs, all: pairs.num_found };
    parts.push(build("span", { "data-severity": "fine" }, t("report.pairs", all)));
  }
  for (const severity of SEVERITIES) {
    const n = findings.filter((finding) => finding.severity === severity).length;
    if (!n) continue;
    const part = build("span", { "data-severity": severity }, t(`report.${severity}`, { n }));
    parts.push(part);
  }
  if (!parts.length) return null;
  const row = build("div", { class: "qwen-edit-lora-summary" });
  parts.forEach((part, index) => row.append(...(index ? [" · ", part] : [part])));
  return row;
}

/** A line of the report; a finding's line has its color, and its kind and count on hover. */
export function buildLine(line, finding) {
  const row = build("div", {}, line || "\u00a0"); // never innerHTML: file names are untrusted
  if (!finding) return row;
  row.dataset.kind = finding.kind;
  row.dataset.severity = finding.severity;
  row.title = finding.count === null ? finding.kind : `${finding.kind}: ${finding.count}`;
  return row;
}
