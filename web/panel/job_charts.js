// A job's curves: the loss large, the others small, each with its last value.

import { CurveChart } from "./curve_chart.js";
import { build, setHidden } from "../elements.js";
import { formatNumber, formatSize } from "../format.js";

const LOSS_HEIGHT = 170; // px
const SMALL_HEIGHT = 74; // px
const MAIN = "--qel-accent";

export class JobCharts {
  constructor(t) {
    this.loss = new CurveChart({
      label: t("chart.loss"),
      height: LOSS_HEIGHT,
      series: [
        { name: "loss", label: t("chart.raw"), color: "--qel-dim", alpha: 0.45, width: 1 },
        { name: "smoothed_loss", label: t("chart.smoothed"), color: MAIN, width: 2 },
      ],
    });
    const log = build("input", { type: "checkbox", onchange: () => this.loss.setLog(log.checked) });
    const small = (name, source, format = formatNumber, color = MAIN) => ({
      name,
      source,
      title: t(`chart.${name}`),
      chart: new CurveChart({
        label: t(`chart.${name}`),
        height: SMALL_HEIGHT,
        format,
        series: [{ name, label: "", color }],
      }),
    });
    this.small = [
      small("learning_rate", "metrics"),
      small("grad_norm", "metrics"),
      small("seconds", "metrics", (value, digits) => `${formatNumber(value, digits)} s`),
      small("memory_bytes", "metrics", formatSize),
      small("std", "health", formatNumber, "--qel-green"),
      small("spectral", "health", formatNumber, "--qel-green"),
      small("effective_rank", "health", formatNumber, "--qel-green"),
    ];
    for (const one of this.small) {
      one.element = build("figure", { class: "qel-small" }, build("figcaption", {}, one.title), one.chart.element);
    }
    this.none = build("p", { class: "qel-empty" }, t("chart.none"));
    this.grid = build("div", { class: "qel-charts" }, ...this.small.map((one) => one.element));
    this.head = build(
      "div",
      { class: "qel-bar" },
      build("h3", {}, t("chart.loss")),
      build("label", { class: "qel-check" }, log, t("chart.log"))
    );
    this.element = build("section", {}, this.head, this.none, this.loss.element);
    // Folded: the loss and the samples decide, and these push them out of sight.
    this.more = build(
      "details",
      { class: "qel-unfold" },
      build("summary", {}, t("chart.more")),
      this.grid
    );
    for (const element of [this.none, this.loss.element, this.more]) setHidden(element, true);
  }

  update({ metrics, health }) {
    const hasSteps = metrics.step.length > 0;
    setHidden(this.none, hasSteps);
    for (const element of [this.loss.element, this.more]) setHidden(element, !hasSteps);
    this.loss.show(metrics.step, metrics);
    for (const { name, source, chart, element } of this.small) {
      const table = source === "health" ? health : metrics;
      setHidden(element, !table[name].some(Number.isFinite));
      chart.show(table.step, table);
    }
  }

  destroy() {
    this.loss.destroy();
    for (const { chart } of this.small) chart.destroy();
  }
}
