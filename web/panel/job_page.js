// One training: its progress, curves, images, LoRA files, log and settings.

import { showProgress, showStatus } from "./job_list.js";
import { JobActions } from "./job_actions.js";
import { JobCharts } from "./job_charts.js";
import { LogView } from "./log_view.js";
import { SampleStrip } from "./sample_strip.js";
import { build, icon, KeyedRows, setAttribute, setHidden, setText } from "../elements.js";
import { formatDuration, formatTime } from "../format.js";

// Minimum interval between requests for the curves of a running job.
const MIN_INTERVAL = 1500; // ms

export class JobPage {
  constructor({ jobs, t, id, open, leave, loadIntoGraph }) {
    Object.assign(this, { jobs, t, id, leave });
    this.shown = null; // the list's entry for the job when its details were last requested
    this.isAsking = false;
    this.askedAt = 0;
    this.timer = null;
    this.problem = build("p", { class: "qel-problem", role: "alert" });
    const fail = (text) => this.fail(text);
    this.actions = new JobActions({ jobs, t, fail, open, leave, loadIntoGraph });
    this.charts = new JobCharts(t);
    this.samples = new SampleStrip({
      t,
      getUrl: (name) => jobs.getImageUrl(id, name),
      archiveUrl: jobs.getDownloadUrl(id, "samples.zip"),
    });
    this.log = new LogView({
      ...{ t, fail: (text) => this.fail(text, true), read: (offset) => jobs.readLog(id, offset) },
      url: jobs.getDownloadUrl(id, "log.txt"),
    });
    this.buildHead();
    this.buildLists(loadIntoGraph);
    this.element = build(
      "div",
      { class: "qel-view qel-page" },
      this.head,
      this.problem,
      this.actions.element,
      this.failure,
      this.alarms,
      this.charts.element,
      this.samples.element,
      this.files,
      this.charts.more,
      this.notes,
      this.log.element,
      this.settings
    );
    setHidden(this.problem, true);
  }

  buildHead() {
    const { t } = this;
    this.name = build("h2", { tabindex: "-1" });
    this.chip = build("span", { class: "qel-status", role: "status" });
    this.bar = build("span", { class: "qel-progress-fill" });
    this.progress = build(
      "span",
      { class: "qel-progress", role: "progressbar", "aria-valuemin": 0, "aria-label": t("job.progress") },
      this.bar
    );
    this.figures = build("div", { class: "qel-note" });
    const back = build(
      "button",
      { type: "button", class: "qel-button qel-back", "aria-label": t("job.back"), onclick: () => this.leave() },
      "←"
    );
    this.head = build(
      "header",
      {},
      build("div", { class: "qel-job-line" }, back, this.name, this.chip),
      this.progress,
      this.figures
    );
  }

  buildLists(loadIntoGraph) {
    const { t } = this;
    const buildLine = () => {
      const element = build("li", {});
      return { element, update: (text) => setText(element, text) };
    };
    const list = (title, kind) => {
      const items = build("ul", {});
      const section = build("section", { class: "qel-notes", "data-kind": kind }, build("h3", {}, title), items);
      section.rows = new KeyedRows(items, buildLine);
      return section;
    };
    this.failureSentence = build("p", {});
    this.failure = build("section", { class: "qel-failure", role: "alert" }, this.failureSentence);
    const advice = build("ul", {});
    this.failure.append(advice);
    this.adviceRows = new KeyedRows(advice, buildLine);
    this.alarms = list(t("job.alarms"), "alarm");
    this.notes = list(t("job.notes"), "note");
    const fileList = build("ul", { class: "qel-files" });
    this.files = build("section", {}, build("h3", {}, t("files.title")), fileList);
    this.fileRows = new KeyedRows(fileList, (name) => {
      const load = async () => {
        try {
          const { published } = await this.jobs.act(this.id, "publish", { adapter: name });
          await loadIntoGraph(published[0]);
        } catch (error) {
          this.fail(error.message);
        }
      };
      const button = build("button", { type: "button", class: "qel-button", onclick: load }, t("action.load"));
      const link = build(
        "a",
        {
          ...{ class: "qel-button", href: this.jobs.getDownloadUrl(this.id, name, true) },
          ...{ download: name, title: t("files.download", { name }) },
          "aria-label": t("files.download", { name }),
        },
        icon("download")
      );
      const buttons = build("span", { class: "qel-file-actions" }, link, button);
      return { element: build("li", {}, build("span", {}, name), buttons), update() {} };
    });
    const table = build("tbody");
    this.settings = build(
      "details",
      { class: "qel-unfold" },
      build("summary", {}, t("settings.title")),
      build("table", {}, table)
    );
    this.settingRows = new KeyedRows(table, ([name]) => {
      const cell = build("td", {});
      return {
        element: build("tr", {}, build("th", { scope: "row" }, name), cell),
        update: ([, value]) => setText(cell, describeSetting(value)),
      };
    });
  }

  /** @param isOfPage whether the next answer takes it back; what an action said stays. */
  fail(text, isOfPage = false) {
    this.canTakeBack = isOfPage;
    setText(this.problem, text);
    setHidden(this.problem, !text);
  }

  // Shows what the list has at once; requests curves, images and log.
  update() {
    const job = this.jobs.jobs.get(this.id);
    if (!job) {
      if (this.jobs.isKnown) this.fail(this.jobs.problem ?? this.t("job.gone"), true);
      return;
    }
    this.updateHead(job);
    if (job !== this.shown) this.schedule();
  }

  schedule() {
    if (this.timer !== null || this.isAsking) return;
    const wait = Math.max(0, this.askedAt + MIN_INTERVAL - Date.now());
    this.timer = setTimeout(() => this.ask(), wait);
  }

  async ask() {
    this.timer = null;
    this.isAsking = true;
    this.askedAt = Date.now();
    this.shown = this.jobs.jobs.get(this.id);
    try {
      const detail = await this.jobs.show(this.id);
      if (this.isDestroyed) return;
      this.updateDetail(detail);
      if (this.canTakeBack) this.fail("");
    } catch (error) {
      this.fail(error.message, true);
    } finally {
      this.isAsking = false;
    }
    await this.log.update();
    if (!this.isDestroyed && this.jobs.jobs.get(this.id) !== this.shown) this.schedule();
  }

  updateHead(job) {
    const { t } = this;
    setText(this.name, job.name);
    showStatus(this.chip, job, t);
    showProgress(this.bar, job);
    setAttribute(this.progress, "aria-valuemax", job.num_steps);
    setAttribute(this.progress, "aria-valuenow", job.step);
    setText(this.figures, describeFigures(job, t));
    this.actions.update(job);
    setHidden(this.failure, !job.failure);
    setText(this.failureSentence, job.failure?.sentence ?? "");
    this.adviceRows.show(job.failure?.advice ?? [], (text) => text);
    for (const [section, texts] of [
      [this.alarms, job.alarms ?? []],
      [this.notes, job.notes ?? []],
    ]) {
      setHidden(section, !texts.length);
      section.rows.show([...new Set(texts)], (text) => text);
    }
  }

  updateDetail(detail) {
    const started = performance.now();
    this.charts.update(detail);
    this.samples.update(detail);
    setHidden(this.files, !detail.files.length);
    this.fileRows.show([...detail.files].reverse(), (name) => name);
    this.settingRows.show(Object.entries(detail.settings), ([name]) => name);
    performance.measure("qwen_edit_lora.page", { start: started });
  }

  destroy() {
    this.isDestroyed = true;
    clearTimeout(this.timer);
    this.charts.destroy();
  }
}

function describeFigures(job, t) {
  const parts = [t("job.steps", { step: job.step, steps: job.num_steps })];
  if (job.status === "in_progress" && Number.isFinite(job.remaining_s)) {
    parts.push(t("job.left", { time: formatDuration(job.remaining_s) }));
  }
  if (job.seconds_per_step) {
    parts.push(t("job.speed", { time: formatDuration(job.seconds_per_step) }));
  }
  if (job.device) parts.push(job.device);
  if (job.started_at) parts.push(t("job.started", { time: formatTime(job.started_at) }));
  return parts.join(" · ");
}

function describeSetting(value) {
  if (value === null || value === "") return "–";
  return Array.isArray(value) ? value.join(", ") : String(value);
}
