// The list of trainings: running ones on top, then queued ones, then the rest, newest first.

import { createNotificationSwitch } from "./desktop_notifications.js";
import { ACTIVE } from "./jobs.js";
import { build, KeyedRows, setAttribute, setHidden, setText } from "../elements.js";
import { formatDuration, formatNumber, formatTime } from "../format.js";

const RANKS = { in_progress: 0, pending: 1, paused: 2 };
const OTHERS = 3;

export class JobList {
  constructor({ jobs, t, open }) {
    this.jobs = jobs;
    this.t = t;
    this.open = open;
    this.filter = "all";
    this.message = build("p", { class: "qel-empty" });
    this.items = build("ul", { class: "qel-jobs", "aria-label": t("list.label") });
    this.rows = new KeyedRows(this.items, (job) => this.buildRow(job));
    this.summary = build("span", { class: "qel-note", role: "status" });
    this.select = build(
      "select",
      { class: "qel-select", "aria-label": t("list.filter"), onchange: () => this.choose() },
      ["all", "active", "paused", "completed", "failed", "cancelled"].map((value) =>
        build("option", { value }, t(`filter.${value}`))
      )
    );
    this.measured = build("ul", { class: "qel-jobs", "aria-label": t("measuring.label") });
    this.measuredRows = new KeyedRows(this.measured, (one) => this.buildMeasured(one));
    this.element = build(
      "div",
      { class: "qel-view" },
      build("div", { class: "qel-bar" }, this.summary, this.select),
      createNotificationSwitch(t),
      this.measured,
      this.message,
      this.items
    );
    this.items.addEventListener("keydown", (event) => this.press(event));
  }

  choose() {
    this.filter = this.select.value;
    this.update();
  }

  update() {
    const { t } = this;
    const all = this.jobs.list();
    const shown = all.filter(
      (job) =>
        this.filter === "all" ||
        (this.filter === "active" ? ACTIVE.has(job.status) : job.status === this.filter)
    );
    shown.sort((a, b) => getRank(a) - getRank(b) || compareInside(a, b));
    this.rows.show(shown, (job) => job.id);
    const active = this.jobs.countActive();
    setText(this.summary, t("list.summary", { n: all.length, active }));
    const { measuring } = this.jobs;
    setHidden(this.measured, !measuring.length);
    this.measuredRows.show(measuring, ({ id }) => id);
    const isFilled = shown.length > 0 || (measuring.length > 0 && !all.length);
    setHidden(this.message, isFilled && !this.jobs.problem);
    const empty = !this.jobs.isKnown ? "list.loading" : all.length ? "list.none" : "list.empty";
    setText(this.message, this.jobs.problem ?? t(empty));
    setAttribute(this.message, "data-tone", this.jobs.problem ? "bad" : "");
  }

  // Not a training yet: it has no page, and ends with the node that runs.
  buildMeasured({ name }) {
    const { t } = this;
    const chip = { class: "qel-status", "data-status": "in_progress" };
    const element = build(
      "li",
      { class: "qel-job qel-measured" },
      build(
        "span",
        { class: "qel-job-line" },
        build("span", { class: "qel-job-name" }, name),
        build("span", chip, t("measuring.status"))
      ),
      build("span", { class: "qel-progress qel-progress-unknown" }, build("span", {})),
      build("span", { class: "qel-note" }, t("measuring.text"))
    );
    return { element, update() {} };
  }

  buildRow(first) {
    const { t } = this;
    const name = build("span", { class: "qel-job-name" });
    const chip = build("span", { class: "qel-status" });
    const bar = build("span", { class: "qel-progress-fill" });
    const progress = build("span", { class: "qel-progress", role: "progressbar", "aria-valuemin": 0 }, bar);
    const left = build("span");
    const right = build("span", { class: "qel-job-right" });
    const button = build(
      "button",
      { class: "qel-job", type: "button", onclick: () => this.open(first.id) },
      build("span", { class: "qel-job-line" }, name, chip),
      progress,
      build("span", { class: "qel-job-line qel-note" }, left, right)
    );
    return {
      element: build("li", {}, button),
      update: (job) => {
        setText(name, job.name);
        showStatus(chip, job, t);
        showProgress(bar, job);
        setAttribute(progress, "aria-valuemax", job.num_steps);
        setAttribute(progress, "aria-valuenow", job.step);
        setAttribute(progress, "aria-label", t("job.progress"));
        setHidden(progress, job.status === "completed");
        setText(left, t("job.steps", { step: job.step, steps: job.num_steps }));
        setText(right, describeRight(job, t));
      },
    };
  }

  press(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const buttons = [...this.items.querySelectorAll("button.qel-job")];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    next?.focus();
    event.preventDefault();
    event.stopPropagation();
  }
}

function getRank(job) {
  return RANKS[job.status] ?? OTHERS;
}

// The queue in execution order, everything else newest first.
function compareInside(a, b) {
  if (a.status === "pending") return a.queued_at - b.queued_at;
  return b.created_at - a.created_at || (a.id < b.id ? 1 : -1);
}

// On the list, a training's page and the nodes: state as a coloured word, and progress.
export function showStatus(chip, job, t) {
  setText(chip, describeStatus(job, t));
  setAttribute(chip, "data-status", job.is_silent ? "failed" : job.status);
}

export function showProgress(bar, job) {
  const share = job.num_steps ? job.step / job.num_steps : 0;
  bar.style.width = `${Math.min(100, 100 * share)}%`;
}

function describeStatus(job, t) {
  if (job.is_silent) return t("status.silent");
  if (job.status === "in_progress") {
    if (job.request === "pause") return t("status.pausing");
    if (job.request === "cancel") return t("status.cancelling");
    return t(`phase.${job.phase ?? "training"}`);
  }
  return t(`status.${job.status}`);
}

function describeRight(job, t) {
  if (job.status === "in_progress") {
    const rest = Number.isFinite(job.remaining_s)
      ? t("job.left", { time: formatDuration(job.remaining_s) })
      : "";
    const loss = Number.isFinite(job.smoothed_loss) ? formatNumber(job.smoothed_loss) : "";
    return [loss && t("job.loss", { loss }), rest].filter(Boolean).join(" · ");
  }
  if (job.status === "pending") return t("job.queued");
  return formatTime(job.ended_at ?? job.created_at);
}
