// One set: its pairs in a grid, to look at, caption, add, replace and remove.

import { build, setAttribute, setHidden, setText } from "../elements.js";
import { DropZone } from "./drop_zone.js";
import { uploadDraft } from "./dropped_files.js";
import { FindingsQueue } from "./findings_queue.js";
import { createPairCard } from "./pair_card.js";
import { createPairGrid } from "./pair_grid.js";
import { PairViewer } from "./pair_viewer.js";
import { askForText } from "./dialogs.js";
import { getGraphImageUrl, listGraphImages } from "./graph_images.js";
import { MaskEditor } from "./mask_editor.js";
import { PlaceDialog } from "./place_dialog.js";
import { readPastedImage } from "./pasting.js";
import { openTrainingTemplate } from "./train.js";
import { UndoBar } from "./undo_bar.js";

const ORDERS = ["name", "backwards", "uncaptioned"];
/** Set id -> {filter, order, top, edits}: how each was left while this page of ComfyUI is open. */
const left = new Map();

export class SetPage {
  constructor({ app, api, client, t, id, leave }) {
    Object.assign(this, { app, api, client, t, id });
    this.pairs = [];
    this.isGone = false;
    this.isLoaded = false;
    const { filter = "all", order = "name", edits } = left.get(id) ?? {};
    Object.assign(this, { filter, order });
    /** Pair id -> {draft, saved, failure}. */
    this.edits = new Map(edits);
    /** Pair id -> promise of its last save. */
    this.saves = new Map();
    /** Ids of pairs that are being removed. */
    this.leaving = new Set();
    this.numChanges = 0; // made on this page
    this.findings = new FindingsQueue(client, id, (pair) => this.grid.refresh(pair));
    this.name = build("h2", { tabindex: "-1" });
    this.problem = build("p", { class: "qel-problem", role: "alert", hidden: true });
    this.count = build("span", { class: "qel-note", role: "status" });
    this.select = this.buildSelect("filter", ["all", "uncaptioned", "incomplete"]);
    this.orderSelect = this.buildSelect("order", ORDERS);
    this.train = this.button("pairs.train", () => this.openTraining(), "qel-button-primary");
    this.add = this.button("pairs.add", () => this.toggleZone());
    this.add.setAttribute("aria-expanded", "false");
    this.zone = new DropZone({
      t,
      label: t("pairs.add_title"),
      confirm: t("pairs.upload"),
      withName: false,
      onconfirm: (draft, _, onstep) => this.upload(draft, onstep),
    });
    this.zone.element.hidden = true;
    this.undoBar = new UndoBar({ t, undo: (token) => this.undo(token) });
    this.empty = build("p", { class: "qel-empty", hidden: true });
    this.viewer = new PairViewer({ client, setId: id, t, put: (...args) => this.put(...args) });
    const onsaved = (answer) => this.take(answer, "mask.changed");
    this.maskEditor = new MaskEditor({ client, setId: id, t, onsaved });
    this.placing = new PlaceDialog({
      t,
      getPairs: () => this.pairs,
      onadded: (answer) => this.take(answer, "pairs.replaced"),
    });
    this.grid = createPairGrid({
      label: t("pairs.grid"),
      createCard: () => createPairCard({ client, setId: id, t, actions: this }),
      getState: (pair) => ({ ...this.edits.get(pair.id), found: this.findings.get(pair) }),
      onshow: (visible) => this.findings.want(visible),
    });
    const back = build(
      "button",
      { type: "button", class: "qel-button qel-back", "aria-label": t("pairs.back"), onclick: leave },
      "‹",
    );
    this.element = build(
      "div",
      // Takes the focus of a click between the cards, so that an image can be pasted then.
      { class: "qel-view qel-pairs qel-set-page", tabindex: "-1" },
      build("div", { class: "qel-bar" }, back, this.name, this.train),
      this.problem,
      build(
        "div",
        { class: "qel-bar qel-set-tools" },
        this.add,
        this.button("pairs.from_graph", () => this.offerGraphImages()),
        this.button("pairs.fill", () => this.fill()),
        this.button("pairs.trigger", () => this.addTrigger()),
      ),
      this.zone.element,
      build(
        "div",
        { class: "qel-bar" },
        this.count,
        build("div", { class: "qel-set-filters" }, this.select, this.orderSelect),
      ),
      this.empty,
      this.grid.element,
      this.undoBar.element,
      this.viewer.element,
      this.maskEditor.element,
      this.placing.element,
    );
    this.element.addEventListener("paste", (event) => this.paste(event));
    this.onhide = () => this.saveDrafts();
    window.addEventListener("pagehide", this.onhide);
    this.load();
  }

  button(key, onclick, more = "") {
    const properties = { type: "button", class: `qel-button ${more}`, onclick };
    return build("button", properties, this.t(key));
  }

  buildSelect(name, values) {
    const { t } = this;
    const select = build(
      "select",
      { class: "qel-select", "aria-label": t(`pairs.${name}`), onchange: () => this.choose() },
      values.map((value) => build("option", { value }, t(`pairs.${name}.${value}`))),
    );
    select.value = this[name];
    return select;
  }

  // A caption that is being typed is saved, as when it is left.
  saveDrafts() {
    for (const [id, { draft }] of this.edits) {
      const pair = this.pairs.find((one) => one.id === id);
      if (pair && draft !== undefined) this.save(pair, draft);
    }
  }

  destroy() {
    window.removeEventListener("pagehide", this.onhide);
    this.saveDrafts();
    this.isGone = true;
    const { filter, order, grid } = this;
    if (this.isLoaded) left.set(this.id, { filter, order, top: grid.element.scrollTop });
    this.undoBar.destroy();
    this.findings.stop();
    this.grid.destroy();
  }

  async load() {
    try {
      const set = await this.showUnchanged();
      if (this.isGone) return;
      const known = new Map(this.pairs.map((pair) => [pair.id, pair]));
      // Keeps the object of an unchanged pair, so that its card is not drawn anew.
      this.pairs = set.pairs.map((pair) => {
        const old = known.get(pair.id);
        return JSON.stringify(old) === JSON.stringify(pair) ? old : pair;
      });
      this.folder = set.name;
      setText(this.name, set.name);
      this.report("");
      if (!this.pairs.length && !known.size) this.toggleZone(true);
    } catch (error) {
      this.report(error.message);
    }
    this.draw();
    if (!this.isLoaded) this.grid.element.scrollTop = left.get(this.id)?.top ?? 0;
    this.isLoaded = true;
  }

  // The set as it is on the disk; asked again if this page changed it meanwhile.
  async showUnchanged() {
    for (;;) {
      const before = this.numChanges;
      const set = await this.client.show(this.id);
      if (before === this.numChanges || this.isGone) return set;
    }
  }

  report(text) {
    setText(this.problem, text);
    setHidden(this.problem, !text);
  }

  refuse(text) {
    this.report(text);
  }

  choose() {
    this.filter = this.select.value;
    this.order = this.orderSelect.value;
    this.draw();
  }

  draw() {
    const start = performance.now();
    this.drawPairs();
    performance.measure("qwen_edit_lora.pairs", { start });
  }

  drawPairs() {
    const { t, pairs } = this;
    const tests = {
      all: () => true,
      uncaptioned: (pair) => !pair.caption || this.edits.has(pair.id),
      incomplete: (pair) => !pair.target || !pair.references.length,
    };
    const shown = sortPairs(pairs.filter(tests[this.filter]), this.order);
    this.grid.show(shown);
    const missing = pairs.filter((pair) => !pair.caption).length;
    const facts = [t("pairs.count", { n: pairs.length })];
    if (missing) facts.push(t("pairs.uncaptioned", { n: missing }));
    setText(this.count, facts.join(" · "));
    setHidden(this.empty, shown.length > 0);
    setText(this.empty, t(pairs.length ? "pairs.no_match" : "pairs.empty"));
    this.train.disabled = !pairs.length;
  }

  replacePair(pair) {
    this.numChanges += 1;
    this.pairs = this.pairs.map((one) => (one.id === pair.id ? pair : one));
    this.draw();
  }

  // --- captions ---

  edit(pair, draft) {
    this.edits.set(pair.id, { ...this.edits.get(pair.id), draft, saved: "", failure: "" });
    this.grid.refresh(pair);
  }

  // Saves of one pair wait for each other: each says which caption it replaces.
  save(pair, text) {
    const { draft, failure: seen } = this.edits.get(pair.id) ?? {};
    if (draft === undefined) return;
    const before = this.saves.get(pair.id) ?? Promise.resolve();
    this.saves.set(
      pair.id,
      before.then(() => this.saveNow(pair.id, text, seen)),
    );
  }

  async saveNow(id, text, seen) {
    const pair = this.pairs.find((one) => one.id === id);
    const edit = this.edits.get(id);
    if (!pair || edit?.draft === undefined) return;
    // The save before this one met another caption, which nobody has seen yet: it stays.
    if (edit.failure && edit.failure !== seen) return;
    if (text.trim() === pair.caption) {
      if (this.edits.get(id).draft === text) this.edits.delete(id);
      this.grid.refresh(pair);
      return;
    }
    this.edits.set(id, { ...this.edits.get(id), saved: "saving", failure: "" });
    this.grid.refresh(pair);
    let after = { draft: text };
    let saved = pair;
    try {
      const { caption } = await this.client.saveCaption(this.id, id, text, pair.caption);
      saved = { ...pair, caption, fault: "" };
      after = { saved: "saved" };
    } catch (error) {
      after.failure = error.message;
      const other = error.status === 409 && (await this.findOnDisk(id));
      if (other) {
        saved = other; // what the next save replaces, if the user keeps their text
        after.failure = this.t("pairs.conflict", { caption: other.caption });
      }
    }
    // Whatever was typed meanwhile is saved when that is left.
    const { draft } = this.edits.get(id) ?? {};
    const isOther = draft !== undefined && draft !== text;
    this.edits.set(id, isOther ? { draft, failure: after.failure } : after);
    this.numChanges += 1;
    this.pairs = this.pairs.map((one) => (one.id === id ? saved : one));
    if (this.isGone) return this.keep(saved, this.edits.get(id));
    this.draw();
    this.findings.again(saved);
  }

  // A caption that could not be saved as its set was left is in its field when it is opened again.
  keep(pair, edit) {
    if (!edit?.failure) return;
    const one = left.get(this.id);
    one.edits = new Map([...(one.edits ?? []), [pair.id, edit]]);
    this.tell("error", this.t("pairs.left_unsaved", { name: pair.name }), edit.failure);
  }

  async findOnDisk(id) {
    const set = await this.client.show(this.id).catch(() => null);
    return set?.pairs.find((pair) => pair.id === id);
  }

  next(pair) {
    const { pairs } = this.grid;
    const following = pairs[pairs.findIndex(({ id }) => id === pair.id) + 1];
    if (following) this.grid.focusCaption(following);
  }

  async fill() {
    const { t } = this;
    const n = this.pairs.filter((pair) => !pair.caption).length;
    const label = t("pairs.fill_label");
    const text = await askForText(this.element, t("pairs.fill_title", { n }), label, t, true);
    if (text) await this.changeCaptions({ fill: text });
  }

  async addTrigger() {
    const { t } = this;
    const label = t("pairs.trigger_label");
    const text = await askForText(this.element, t("pairs.trigger_title"), label, t, false);
    if (text) await this.changeCaptions({ trigger: text });
  }

  async changeCaptions(options) {
    try {
      await Promise.all(this.saves.values());
      const { num_changed: n, removed } = await this.client.changeCaptions(this.id, options);
      this.numChanges += 1;
      // What could not be saved is still in its field.
      for (const [id, { draft }] of this.edits) if (draft === undefined) this.edits.delete(id);
      await this.load();
      this.findings.want(this.grid.visible);
      const summary = this.t("pairs.changed", { n });
      if (removed) this.undoBar.push(removed, summary);
      else this.tell("info", summary);
    } catch (error) {
      this.report(error.message);
    }
  }

  tell(severity, summary, detail) {
    this.app.extensionManager.toast.add({ severity, summary, detail, life: 6000 });
  }

  // --- images ---

  toggleZone(isOpen = this.zone.element.hidden) {
    this.zone.element.hidden = !isOpen;
    setAttribute(this.add, "aria-expanded", isOpen);
  }

  async upload(draft, onstep) {
    const failures = await uploadDraft(this.client, this.id, draft, onstep);
    await this.load();
    if (!failures.length) this.toggleZone(false);
    return failures;
  }

  async put(pair, slot, file) {
    this.report("");
    try {
      const answer = await this.client.upload(this.id, file, slot, pair.id);
      await this.take(answer, "pairs.replaced");
      return answer.pair;
    } catch (error) {
      this.report(error.message);
      return null;
    }
  }

  /** Shows what a change of images made of a pair; `text` is the key of its words. */
  async take({ pair, removed }, text) {
    const isKnown = pair && this.pairs.some(({ id }) => id === pair.id);
    if (isKnown) this.replacePair(pair);
    else await this.load();
    if (!pair) return;
    this.findings.again(pair);
    this.undoBar.push(removed, this.t(text, { name: pair.name }));
  }

  view(pair, slot) {
    this.viewer.show(pair, slot);
  }

  paintMask(pair) {
    this.maskEditor.show(pair);
  }

  async offerGraphImages() {
    this.report("");
    try {
      const images = await listGraphImages(this.api);
      const sources = images.map((image) => ({
        label: image.filename,
        url: getGraphImageUrl(this.api, image),
        name: image.filename.replace(/\.[^.]*$/, ""),
        add: (slot, pairId, name) =>
          this.client.addOutput(this.id, image, slot, pairId, name && `${name}.png`),
      }));
      this.placing.show(this.t("place.title"), sources, this.t("place.none"));
    } catch (error) {
      this.report(error.message);
    }
  }

  // An image of the clipboard, for the side that has the focus or for a new pair.
  paste(event) {
    const file = readPastedImage(event);
    if (!file || this.element.querySelector("dialog[open]")) return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI would add a node
    const url = URL.createObjectURL(file);
    const source = {
      label: this.t("place.pasted"),
      url,
      name: this.t("place.pasted_name"),
      add: (slot, pairId, name) => this.client.upload(this.id, file, slot, pairId, `${name}.png`),
      isOnce: true,
      release: () => URL.revokeObjectURL(url),
    };
    this.placing.show(this.t("place.pasted_title"), [source], "", this.grid.findFocused());
  }

  async remove(pair) {
    if (this.leaving.has(pair.id)) return; // a double click
    this.leaving.add(pair.id);
    this.report("");
    try {
      const { removed } = await this.client.remove(this.id, pair.id);
      this.edits.delete(pair.id);
      this.numChanges += 1;
      this.pairs = this.pairs.filter(({ id }) => id !== pair.id);
      this.draw();
      this.undoBar.push(removed, this.t("pairs.removed", { name: pair.name }));
      this.undoBar.button.focus(); // the button that was pressed is gone
    } catch (error) {
      this.report(error.message);
    }
    this.leaving.delete(pair.id);
  }

  // What is not there any more, since the trash was emptied, cannot be tried again.
  async undo(token) {
    let problem = "";
    let isDone = true;
    try {
      const { num_edited: n } = await this.client.restore(this.id, token);
      this.numChanges += 1;
      if (n) this.tell("info", this.t("pairs.edited_since", { n }));
      for (const [id, { draft }] of this.edits) if (draft === undefined) this.edits.delete(id);
    } catch (error) {
      problem = error.message;
      isDone = error.status === 404;
    }
    await this.load();
    this.findings.want(this.grid.visible);
    this.report(problem);
    if (!this.undoBar.changes.length) this.grid.element.querySelector("textarea")?.focus();
    return isDone;
  }

  async openTraining() {
    try {
      await openTrainingTemplate(this.app, this.api, this.folder);
      const summary = this.t("pairs.training_opened", { name: this.folder });
      const detail = this.t("pairs.training_hint");
      this.app.extensionManager.toast.add({ severity: "success", summary, detail, life: 6000 });
    } catch (error) {
      this.report(error.message);
    }
  }
}

function sortPairs(pairs, order) {
  if (order === "backwards") return pairs.toReversed();
  if (order !== "uncaptioned") return pairs;
  return [...pairs.filter((pair) => !pair.caption), ...pairs.filter((pair) => pair.caption)];
}
