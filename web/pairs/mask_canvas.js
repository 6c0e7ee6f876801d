// A mask that is painted with a brush over an image: strokes, which can be taken back one by one.

import { build } from "../elements.js";

const COLOR = "#ff2d95"; // seldom in photographs; --qel-mask in the style sheet
const KEY_STEPS = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
};

export class MaskCanvas {
  /** @param onchange called after each stroke. */
  constructor({ label, onchange }) {
    this.onchange = onchange;
    this.brush = 64; // px of the canvas
    this.isErasing = false;
    /** What was there before, and [{points, size, isErasing} or {isClear}, …]. */
    this.base = null;
    this.strokes = [];
    this.canvas = build("canvas", {
      class: "qel-mask-canvas",
      tabindex: "0",
      role: "application",
      "aria-label": label,
    });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.cursor = build("span", { class: "qel-mask-cursor", hidden: true });
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", () => this.lift());
    this.canvas.addEventListener("pointercancel", () => this.lift());
    this.canvas.addEventListener("pointerleave", () => (this.cursor.hidden = true));
    this.canvas.addEventListener("keydown", (event) => this.pressKey(event));
    this.canvas.addEventListener("blur", () => (this.cursor.hidden = true));
  }

  /** Starts anew, with a mask of whatever size or none. */
  start(width, height, mask) {
    Object.assign(this.canvas, { width, height });
    this.at = [width / 2, height / 2];
    this.strokes = [];
    this.stroke = null;
    this.base = null;
    if (mask) {
      this.base = build("canvas", { width, height });
      const context = this.base.getContext("2d");
      context.drawImage(mask, 0, 0, width, height);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = COLOR;
      context.fillRect(0, 0, width, height);
    }
    this.draw();
  }

  get isChanged() {
    return this.strokes.length > 0;
  }

  /** Whether nothing is painted. */
  get isEmpty() {
    const { width, height } = this.canvas;
    const { data } = this.context.getImageData(0, 0, width, height);
    for (let i = 3; i < data.length; i += 4) if (data[i]) return false;
    return true;
  }

  undo() {
    this.stroke = null; // one that is being painted ends here
    this.strokes.pop();
    this.draw();
    this.onchange();
  }

  clear() {
    this.stroke = null;
    this.strokes.push({ isClear: true });
    this.draw();
    this.onchange();
  }

  /** A PNG: white where it is painted, black elsewhere. */
  toBlob() {
    const { width, height } = this.canvas;
    const copy = build("canvas", { width, height });
    const context = copy.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    return new Promise((resolve) => copy.toBlob(resolve, "image/png"));
  }

  // --- strokes ---

  press(event) {
    if (event.button) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.begin(this.locate(event));
    this.showCursor();
  }

  move(event) {
    this.at = this.locate(event);
    this.showCursor();
    if (!this.stroke) return;
    // A fast pointer moves several times between two frames.
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) this.extend(this.locate(one));
  }

  lift() {
    if (!this.stroke) return;
    this.stroke = null;
    this.onchange();
  }

  pressKey(event) {
    const step = KEY_STEPS[event.key];
    if (step) {
      const length = Math.max(1, this.brush / 2);
      const limits = [this.canvas.width, this.canvas.height];
      this.at = this.at.map((x, i) => Math.min(limits[i], Math.max(0, x + step[i] * length)));
    } else if (event.key === " " || event.key === "Enter") {
      this.begin(this.at);
      this.lift();
    } else return;
    event.preventDefault();
    this.showCursor();
  }

  begin(point) {
    this.stroke = { points: [point], size: this.brush, isErasing: this.isErasing };
    this.strokes.push(this.stroke);
    drawStroke(this.context, this.stroke, 0);
  }

  extend(point) {
    this.stroke.points.push(point);
    drawStroke(this.context, this.stroke, this.stroke.points.length - 2);
  }

  draw() {
    const { width, height } = this.canvas;
    this.context.clearRect(0, 0, width, height);
    const cleared = this.strokes.findLastIndex((stroke) => stroke.isClear);
    if (cleared < 0 && this.base) this.context.drawImage(this.base, 0, 0);
    for (const stroke of this.strokes.slice(cleared + 1)) drawStroke(this.context, stroke, 0);
  }

  // --- where ---

  locate({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.canvas;
    return [
      ((clientX - box.left) / box.width) * width,
      ((clientY - box.top) / box.height) * height,
    ];
  }

  showCursor() {
    const { width, height } = this.canvas;
    const { style } = this.cursor;
    this.cursor.hidden = false;
    style.left = `${(this.at[0] / width) * 100}%`;
    style.top = `${(this.at[1] / height) * 100}%`;
    style.width = `${(this.brush / width) * 100}%`;
  }
}

/** Draws a stroke from one of its points on; a point alone is a dot. */
function drawStroke(context, { points, size, isErasing }, from) {
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = COLOR;
  context.lineWidth = size;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  if (points.length === 1) {
    context.arc(...points[0], size / 2, 0, 2 * Math.PI);
    context.fill();
  } else {
    context.moveTo(...points[from]);
    for (const point of points.slice(from + 1)) context.lineTo(...point);
    context.stroke();
  }
  context.globalCompositeOperation = "source-over";
}
