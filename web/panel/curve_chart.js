// A curve over the steps on a canvas, with the values under the pointer or the arrow keys.

import { build, setText } from "../elements.js";
import { formatNumber } from "../format.js";
import { createScale, findNearest, findRange, listTicks } from "./scales.js";

const FONT = "10px ui-sans-serif, system-ui, sans-serif";
const MARGIN = { left: 52, right: 8, top: 8, bottom: 16 }; // px
const LINE_HEIGHT = 14; // px

export class CurveChart {
  // series: [{ name, label, color (a CSS variable), alpha, width }]; format(value, digits) -> text
  constructor({ label, series, height, format = formatNumber }) {
    this.label = label;
    this.series = series;
    this.format = format;
    this.isLog = false;
    this.steps = [];
    this.values = {};
    this.cursor = null; // index of a point
    this.canvas = build("canvas", { class: "qel-chart-canvas", tabindex: "0", role: "img" });
    // Spoken only while the arrow keys move over the chart: it changes with every training step.
    this.readout = build("div", { class: "qel-chart-readout", "aria-live": "off" });
    this.element = build("div", { class: "qel-chart" }, this.canvas, this.readout);
    this.element.style.height = `${height}px`;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.setCursor(null));
    this.canvas.addEventListener("focus", () => this.readout.setAttribute("aria-live", "polite"));
    this.canvas.addEventListener("blur", () => {
      this.readout.setAttribute("aria-live", "off");
      this.setCursor(null);
    });
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.element);
  }

  destroy() {
    this.observer.disconnect();
  }

  setLog(isLog) {
    this.isLog = isLog;
    this.draw();
  }

  // steps: ascending; values: name of a series -> list as long as steps, null where missing.
  show(steps, values) {
    this.steps = steps;
    this.values = values;
    if (this.cursor !== null) this.cursor = Math.min(this.cursor, steps.length - 1);
    this.canvas.setAttribute("aria-label", this.describe());
    this.draw();
  }

  describe() {
    if (!this.steps.length) return `${this.label}: no steps yet`;
    const parts = this.series.map(({ name, label }) => {
      const values = (this.values[name] ?? []).filter(Number.isFinite);
      if (!values.length) return `${label}: none`;
      return `${label} from ${this.format(values[0])} to ${this.format(values.at(-1))}`;
    });
    return `${this.label}, steps ${this.steps[0]} to ${this.steps.at(-1)}: ${parts.join(", ")}`;
  }

  point(event) {
    if (!this.steps.length) return;
    const { left, width } = this.canvas.getBoundingClientRect();
    const share =
      (event.clientX - left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    this.setCursor(findNearest(this.steps, first + share * (last - first)));
  }

  press(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
    const last = this.steps.length - 1;
    if (last < 0) return;
    if (event.key in moves) this.setCursor((this.cursor ?? last) + moves[event.key]);
    else if (event.key === "Home") this.setCursor(0);
    else if (event.key === "End") this.setCursor(last);
    else if (event.key === "Escape" && this.cursor !== null) this.setCursor(null);
    else return;
    event.preventDefault();
    event.stopPropagation(); // the graph has keyboard shortcuts of its own
  }

  setCursor(index) {
    const cursor =
      index === null ? null : Math.max(0, Math.min(this.steps.length - 1, index));
    if (cursor === this.cursor) return;
    this.cursor = cursor;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== pixels[0]) this.canvas.width = pixels[0];
    if (this.canvas.height !== pixels[1]) this.canvas.height = pixels[1];
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.element);
    const lists = this.series.map(({ name }) => this.values[name] ?? []);
    const range = findRange(lists, this.isLog);
    if (!range || !this.steps.length) {
      setText(this.readout, "");
      return;
    }
    const frame = {
      x: MARGIN.left,
      y: MARGIN.top,
      width: width - MARGIN.left - MARGIN.right,
      height: height - MARGIN.top - MARGIN.bottom,
    };
    const toY = this.drawAxes(context, frame, range, style);
    const toX = this.createXScale(frame);
    context.save();
    context.beginPath();
    context.rect(frame.x - 1, frame.y - 2, frame.width + 2, frame.height + 4);
    context.clip();
    this.series.forEach((one, i) => this.drawLine(context, one, lists[i], toX, toY, style));
    context.restore();
    this.drawCursor(context, frame, toX, toY, style);
  }

  createXScale(frame) {
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    const length = last - first || 1;
    return (step) => frame.x + ((step - first) / length) * frame.width;
  }

  drawAxes(context, frame, range, style) {
    const scale = createScale(range, this.isLog);
    const toY = (value) => frame.y + (1 - scale(value)) * frame.height;
    context.font = FONT;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.strokeStyle = style.getPropertyValue("--qel-line");
    context.fillStyle = style.getPropertyValue("--qel-dim");
    context.lineWidth = 1;
    const count = Math.max(2, Math.floor(frame.height / (3 * LINE_HEIGHT)));
    const ticks = listTicks(range, this.isLog, count);
    const texts = this.labelTicks(ticks);
    ticks.forEach((tick, i) => {
      const y = Math.round(toY(tick)) + 0.5;
      context.beginPath();
      context.moveTo(frame.x, y);
      context.lineTo(frame.x + frame.width, y);
      context.stroke();
      context.fillText(texts[i], frame.x - 5, y);
    });
    const bottom = frame.y + frame.height + LINE_HEIGHT / 2 + 2;
    context.textAlign = "left";
    context.fillText(String(this.steps[0]), frame.x, bottom);
    context.textAlign = "right";
    context.fillText(String(this.steps.at(-1)), frame.x + frame.width, bottom);
    return toY;
  }

  // As many digits as tell them apart.
  labelTicks(ticks) {
    let texts = [];
    for (let digits = 3; digits <= 6; digits++) {
      texts = ticks.map((tick) => this.format(tick, digits));
      if (new Set(texts).size === texts.length) break;
    }
    return texts;
  }

  drawLine(context, { color, alpha = 1, width = 1.5 }, values, toX, toY, style) {
    context.strokeStyle = context.fillStyle = style.getPropertyValue(color);
    context.globalAlpha = alpha;
    context.lineWidth = width;
    context.lineJoin = "round";
    context.beginPath();
    let [drawn, isDown] = [0, false];
    for (let i = 0; i < values.length; i++) {
      const y = values[i] === null ? NaN : toY(values[i]);
      if (!Number.isFinite(y)) {
        isDown = false;
        continue;
      }
      if (isDown) context.lineTo(toX(this.steps[i]), y);
      else context.moveTo(toX(this.steps[i]), y);
      [isDown, drawn] = [true, drawn + 1];
    }
    context.stroke();
    if (drawn === 1) {
      const i = values.findIndex(Number.isFinite); // a line of one point would be invisible
      context.beginPath();
      context.arc(toX(this.steps[i]), toY(values[i]), 2.5, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  drawCursor(context, frame, toX, toY, style) {
    const last = this.steps.length - 1;
    const index = this.cursor ?? last;
    const texts = this.series
      .map(({ name, label }) => [label, this.values[name]?.[index]])
      .filter(([, value]) => Number.isFinite(value))
      .map(([label, value]) => (label ? `${label} ${this.format(value)}` : this.format(value)));
    const where = this.cursor === null ? [] : [`step ${this.steps[index]}`];
    setText(this.readout, [...where, ...texts].join(" · "));
    if (this.cursor === null) return;
    const x = Math.round(toX(this.steps[index])) + 0.5;
    context.strokeStyle = style.getPropertyValue("--qel-dim");
    context.beginPath();
    context.moveTo(x, frame.y);
    context.lineTo(x, frame.y + frame.height);
    context.stroke();
    for (const { name, color } of this.series) {
      const value = this.values[name]?.[index];
      if (!Number.isFinite(value)) continue;
      context.fillStyle = style.getPropertyValue(color);
      context.beginPath();
      context.arc(x, toY(value), 3, 0, 2 * Math.PI);
      context.fill();
    }
  }
}
