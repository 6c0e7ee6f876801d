// A training on the node that started or shows it: state, loss curve, newest image, live.
// It shares the DOM widget of the report; see report.js.

import { CurveChart } from "./panel/curve_chart.js";
import { build, buildImage, setAttribute, setHidden, setText } from "./elements.js";
import { showProgress, showStatus } from "./panel/job_list.js";
import { createTranslator } from "./translation.js";

const HEIGHT = 136; // px, with the gap to the report
const CHART_HEIGHT = 84; // px
const PROPERTY = "qwen_edit_lora_job"; // of the node
const MIN_INTERVAL = 3000; // ms between requests for the curve

export class JobView {
  constructor({ app, jobs, showJob }) {
    const t = createTranslator(app);
    Object.assign(this, { jobs, t, id: null, isRecalled: false });
    Object.assign(this, { shown: null, askedAt: 0, timer: null });
    this.chip = build("span", { class: "qel-status" });
    this.text = build("span", { class: "qel-note" });
    this.bar = build("span", { class: "qel-progress-fill" });
    this.chart = new CurveChart({
      label: t("chart.loss"),
      height: CHART_HEIGHT,
      series: [{ name: "smoothed_loss", label: t("chart.loss"), color: "--qel-accent" }],
    });
    this.image = buildImage({ class: "qel-thumbnail", alt: "" });
    const open = build(
      "button",
      { type: "button", class: "qel-button", onclick: () => showJob(this.id) },
      t("job.open")
    );
    this.element = build(
      "div",
      { class: "qel-job-view" },
      build("div", { class: "qel-job-line" }, this.chip, this.text, open),
      build("span", { class: "qel-progress" }, this.bar),
      build("div", { class: "qel-job-line" }, this.chart.element, this.image)
    );
    setHidden(this.element, true);
    setHidden(this.image, true);
    this.listen = () => this.update();
    jobs.addEventListener("change", this.listen);
  }

  /** Of the space that it takes on a node. */
  getHeight() {
    return this.element.hidden ? 0 : HEIGHT;
  }

  // From a saved workflow: perhaps from another machine, or deleted since; then nothing is shown.
  recall(id) {
    this.isRecalled = true;
    this.showJob(id);
  }

  showJob(id) {
    this.id = id;
    this.shown = null;
    if (!this.jobs.jobs.has(id)) this.jobs.refresh();
    this.update();
  }

  // A report says what was so when the node ran; this view says what is so now.
  markReport(job) {
    if (!this.report || !this.reported) return;
    const [status, step] = this.reported;
    this.report.classList.toggle("qel-outdated", job.status !== status || job.step !== step);
  }

  update() {
    const job = this.jobs.jobs.get(this.id);
    const wasHidden = this.element.hidden;
    setHidden(this.element, this.id === null || (!job && this.isRecalled));
    if (this.element.hidden !== wasHidden) this.onresize?.();
    if (!job) {
      setText(this.text, this.id !== null && this.jobs.isKnown ? this.t("job.gone") : "");
      return;
    }
    showStatus(this.chip, job, this.t);
    showProgress(this.bar, job);
    setText(this.text, this.t("job.steps", { step: job.step, steps: job.num_steps }));
    this.markReport(job);
    if (job !== this.shown && this.timer === null) {
      const wait = Math.max(0, this.askedAt + MIN_INTERVAL - Date.now());
      this.timer = setTimeout(() => this.ask(), wait);
    }
  }

  async ask() {
    this.askedAt = Date.now();
    this.shown = this.jobs.jobs.get(this.id);
    try {
      const { metrics, pictures: images = [] } = await this.jobs.show(this.id);
      this.chart.show(metrics.step, metrics);
      const newest = images
        .filter((image) => image.kind === "sample")
        .reduce((a, b) => (a && a.step >= b.step ? a : b), null);
      setHidden(this.image, !newest);
      if (newest) {
        setAttribute(this.image, "src", this.jobs.getImageUrl(this.id, newest.name));
        setAttribute(this.image, "alt", this.t("samples.step", { step: newest.step }));
      }
    } catch (error) {
      setText(this.text, error.message);
    } finally {
      this.timer = null;
    }
    if (this.jobs.jobs.get(this.id) !== this.shown) this.update();
  }

  destroy() {
    this.jobs.removeEventListener("change", this.listen);
    clearTimeout(this.timer);
    this.chart.destroy();
  }
}

export function addJobWidget(node, context) {
  const view = new JobView(context);
  const report = node.widgets.find((one) => one.name === "report_view").element;
  report.append(view.element);
  view.report = report.firstElementChild;
  view.onresize = node.measureReport;
  node.jobView = view;
  node.showJob = (output) => {
    const id = output?.qwen_edit_lora_job?.[0];
    if (!id) return;
    view.reported = output.qwen_edit_lora_reported;
    if (id === view.id) return view.update();
    view.isRecalled = false;
    view.showJob(id);
    // Saved in the workflow, so that reopening it shows the training again.
    node.setProperty?.(PROPERTY, id);
  };
  node.recallJob = () => {
    const id = node.properties?.[PROPERTY];
    if (typeof id === "string") view.recall(id);
  };
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    executed?.call(this, output, ...rest);
    this.showJob(output);
  };
  const removed = node.onRemoved;
  node.onRemoved = function (...rest) {
    removed?.apply(this, rest);
    view.destroy();
  };
}
