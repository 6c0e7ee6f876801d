// One set: its pairs in a grid, to look at, caption, add, replace and remove.

import { build, setAttribute, setHidden, setText } from "../elements.js";
import { DropZone } from "./drop_zone.js";
import { uploadDraft } from "./dropped_files.js";
import { FindingsQueue } from "./findings_queue.js";
import { createPairCard } from "./pair_card.js";
import { createPairGrid } from "./pair_grid.js";
import { PairViewer } from "./pair_viewer.js";
import { askForText } from "./dialogs.js";
import { openTrainingTemplate } from "./train.js";

const UNDO_TIME = 30_000; // ms that a removal can be undone from the page

export class SetPage {
  constructor({ app, api, client, t, id, leave }) {
    Object.assign(this, { app, api, client, t, id });
    this.pairs = [];
    this.isGone = false;
    /** {token, name} of the pairs removed on this page, the last one last. */
    this.removed = [];
    this.filter = "all";
    /** Pair id -> {draft, saved, failure}. */
    this.edits = new Map();
    /** Pair id -> promise of its last save. */
    this.saves = new Map();
    this.findings = new FindingsQueue(client, id, (pair) => this.grid.refresh(pair));
    this.name = build("h2", { tabindex: "-1" });
    this.problem = build("p", { class: "qel-problem", role: "alert", hidden: true });
    this.count = build("span", { class: "qel-note", role: "status" });
    this.select = build(
      "select",
      { class: "qel-select", "aria-label": t("pairs.filter"), onchange: () => this.choose() },
      ["all", "uncaptioned", "incomplete"].map((value) =>
        build("option", { value }, t(`pairs.filter.${value}`)),
      ),
    );
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
    this.undoText = build("span", {});
    this.undoButton = this.button("pairs.undo", () => this.undo());
    this.undoBar = build(
      "div",
      { class: "qel-undo", role: "status", hidden: true },
      this.undoText,
      this.undoButton,
    );
    this.empty = build("p", { class: "qel-empty", hidden: true });
    this.viewer = new PairViewer({ client, setId: id, t, put: (...args) => this.put(...args) });
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
      { class: "qel-view qel-pairs qel-set-page" },
      build("div", { class: "qel-bar" }, back, this.name, this.train),
      this.problem,
      build(
        "div",
        { class: "qel-bar qel-set-tools" },
        this.add,
        this.button("pairs.fill", () => this.fill()),
        this.button("pairs.trigger", () => this.addTrigger()),
      ),
      this.zone.element,
      build("div", { class: "qel-bar" }, this.count, this.select),
      this.empty,
      this.grid.element,
      this.undoBar,
      this.viewer.element,
    );
    this.onhide = () => this.saveDrafts();
    window.addEventListener("pagehide", this.onhide);
    this.load();
  }

  button(key, onclick, more = "") {
    const properties = { type: "button", class: `qel-button ${more}`, onclick };
    return build("button", properties, this.t(key));
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
    clearTimeout(this.undoTimer);
    this.findings.stop();
    this.grid.destroy();
  }

  async load() {
    try {
      const set = await this.client.show(this.id);
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
    this.draw();
  }

  draw() {
    const { t, pairs } = this;
    const tests = {
      all: () => true,
      uncaptioned: (pair) => !pair.caption || this.edits.has(pair.id),
      incomplete: (pair) => !pair.target || !pair.references.length,
    };
    const shown = pairs.filter(tests[this.filter]);
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
    if (this.edits.get(pair.id)?.draft === undefined) return;
    const before = this.saves.get(pair.id) ?? Promise.resolve();
    this.saves.set(
      pair.id,
      before.then(() => this.saveNow(pair.id, text)),
    );
  }

  async saveNow(id, text) {
    const pair = this.pairs.find((one) => one.id === id);
    if (!pair || this.edits.get(id)?.draft === undefined) return;
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
    this.edits.set(id, draft !== undefined && draft !== text ? { draft } : after);
    this.pairs = this.pairs.map((one) => (one.id === id ? saved : one));
    if (this.isGone) return;
    this.draw();
    this.findings.again(saved);
  }

  async findOnDisk(id) {
    const set = await this.client.show(this.id).catch(() => null);
    return set?.pairs.find((pair) => pair.id === id);
  }

  next(pair) {
    const index = this.pairs.findIndex(({ id }) => id === pair.id);
    const following = this.pairs[index + 1];
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
      const { num_changed: n } = await this.client.changeCaptions(this.id, options);
      this.edits.clear();
      await this.load();
      this.findings.want(this.grid.visible);
      const summary = this.t("pairs.changed", { n });
      this.app.extensionManager.toast.add({ severity: "success", summary, life: 4000 });
    } catch (error) {
      this.report(error.message);
    }
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
      if (answer.pair?.id === pair.id) this.replacePair(answer.pair);
      else await this.load();
      if (answer.pair) this.findings.again(answer.pair);
      return answer.pair;
    } catch (error) {
      this.report(error.message);
      return null;
    }
  }

  view(pair, slot) {
    this.viewer.show(pair, slot);
  }

  async remove(pair) {
    this.report("");
    const index = this.pairs.findIndex(({ id }) => id === pair.id);
    try {
      const { removed } = await this.client.remove(this.id, pair.id);
      this.removed.push({ token: removed, name: pair.name });
      this.edits.delete(pair.id);
      this.pairs = this.pairs.filter((_, i) => i !== index);
      this.draw();
      this.showUndo();
    } catch (error) {
      this.report(error.message);
    }
  }

  showUndo() {
    setText(this.undoText, this.t("pairs.removed", { name: this.removed.at(-1).name }));
    setHidden(this.undoBar, false);
    this.undoButton.focus();
    clearTimeout(this.undoTimer);
    this.undoTimer = setTimeout(() => setHidden(this.undoBar, true), UNDO_TIME);
  }

  async undo() {
    clearTimeout(this.undoTimer);
    setHidden(this.undoBar, true);
    let problem = "";
    try {
      await this.client.restore(this.id, this.removed.pop().token);
    } catch (error) {
      problem = error.message;
    }
    await this.load();
    this.report(problem);
    if (this.removed.length) this.showUndo(); // of the one removed before
    else this.grid.element.querySelector("textarea")?.focus();
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
