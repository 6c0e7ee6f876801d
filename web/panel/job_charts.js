// A job's curves: the loss large, the rest small, each with its last value.

import { CurveChart } from "./curve_chart.js";
import { formatBytes, formatNumber, h, setHidden } from "./dom.js";

const LOSS_HEIGHT = 170; // px
const SMALL_HEIGHT = 74; // px
const MAIN = "--qel-accent";

export class JobCharts {
  constructor(t) {
    this.loss = new CurveChart({
      label: t("chart.loss"),
      height: LOSS_HEIGHT,
      series: [
        { name: "loss", label: t("chart.raw"), color: "--qel-faint", alpha: 0.45, width: 1 },
        { name: "smoothed_loss", label: t("chart.smoothed"), color: MAIN, width: 2 },
      ],
    });
    const log = h("input", { type: "checkbox", onchange: () => this.loss.setLog(log.checked) });
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
      small("seconds", "metrics", (value) => `${formatNumber(value)} s`),
      small("memory_bytes", "metrics", formatBytes),
      small("std", "health", formatNumber, "--qel-good"),
      small("spectral", "health", formatNumber, "--qel-good"),
      small("effective_rank", "health", formatNumber, "--qel-good"),
    ];
    for (const one of this.small) {
      one.element = h("figure", { class: "qel-small" }, h("figcaption", {}, one.title), one.chart.element);
    }
    this.none = h("p", { class: "qel-empty" }, t("chart.none"));
    this.grid = h("div", { class: "qel-charts" }, ...this.small.map((one) => one.element));
    this.head = h(
      "div",
      { class: "qel-bar" },
      h("h3", {}, t("chart.loss")),
      h("label", { class: "qel-check" }, log, t("chart.log"))
    );
    this.element = h("section", {}, this.head, this.none, this.loss.element, this.grid);
    for (const element of [this.none, this.loss.element, this.grid]) setHidden(element, true);
  }

  update({ metrics, health }) {
    const hasSteps = metrics.step.length > 0;
    setHidden(this.none, hasSteps);
    for (const element of [this.loss.element, this.grid]) setHidden(element, !hasSteps);
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
