// Takes an image from the graph's outputs or the clipboard, as a side of a new or an existing pair.

import { build, setAttribute, setHidden, setText } from "../elements.js";
import { buildPairImage } from "./pair_card.js";
import { MAX_REFERENCES } from "./sides.js";

export class PlaceDialog {
  /**
   * @param getPairs () => the set's pairs.
   * @param onadded (answer) of the server, after each image.
   */
  constructor({ t, getPairs, onadded }) {
    Object.assign(this, { t, getPairs, onadded });
    /** The chosen one of the sources. */
    this.chosen = null;
    this.title = build("h3", {});
    this.message = build("p", { class: "qel-empty", hidden: true });
    this.list = build("div", {
      class: "qel-sources",
      role: "group",
      "aria-label": t("place.images"),
    });
    this.side = build("select", { class: "qel-select", onchange: () => this.update() });
    for (let slot = 0; slot <= MAX_REFERENCES; slot++) {
      const name = slot ? t("pairs.reference", { n: slot }) : t("pairs.target");
      this.side.append(build("option", { value: slot }, name));
    }
    this.pair = build("select", { class: "qel-select", onchange: () => this.choosePair() });
    this.name = build("input", { class: "qel-input", spellcheck: "false" });
    this.nameField = build("label", { class: "qel-question" }, t("place.name"), this.name);
    this.fields = build(
      "div",
      { class: "qel-place" },
      build("label", { class: "qel-question" }, t("place.side"), this.side),
      build("label", { class: "qel-question" }, t("place.pair"), this.pair),
      this.nameField,
    );
    this.status = build("p", { class: "qel-note", role: "status" });
    this.problem = build("p", { class: "qel-problem", role: "alert", hidden: true });
    this.yes = build("button", { class: "qel-button qel-button-primary", type: "submit" });
    this.form = build(
      "form",
      {},
      this.title,
      this.message,
      this.list,
      this.fields,
      this.problem,
      this.status,
      build(
        "div",
        { class: "qel-bar qel-end" },
        build(
          "button",
          { type: "button", class: "qel-button", onclick: () => this.element.close() },
          t("dialog.close"),
        ),
        this.yes,
      ),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add();
    });
    this.element = build("dialog", { class: "qel-dialog qel-place-dialog" }, this.form);
    this.element.addEventListener("keydown", (event) => event.stopPropagation());
    this.element.addEventListener("close", () => this.sources?.forEach((one) => one.release?.()));
  }

  /**
   * @param sources [{label, url, name, add(slot, pairId, name), isOnce?, release?()}]; one with
   *   isOnce closes the dialog when it was added.
   * @param empty text when there are none.
   * @param place {pairId, slot} to begin with.
   */
  show(title, sources, empty, place = {}) {
    this.sources = sources;
    this.title.textContent = title;
    this.element.setAttribute("aria-label", title);
    setText(this.message, empty);
    setHidden(this.message, sources.length > 0);
    for (const part of [this.list, this.fields, this.yes]) setHidden(part, !sources.length);
    this.buttons = sources.map((source) => this.buildSource(source));
    this.list.replaceChildren(...this.buttons);
    setText(this.status, "");
    this.report("");
    this.offerPairs(place.pairId ?? "");
    this.side.value = "0";
    if (place.slot === undefined) this.choosePair();
    else this.side.value = place.slot;
    this.choose(sources[0] ?? null);
    if (!this.element.open) this.element.showModal();
    (this.buttons[0] ?? this.element.querySelector("button")).focus();
  }

  buildSource(source) {
    return build(
      "button",
      {
        type: "button",
        class: "qel-source",
        "aria-label": source.label,
        title: source.label,
        onclick: () => this.choose(source),
      },
      buildPairImage(source.url, this.t),
    );
  }

  choose(source) {
    this.chosen = source;
    this.buttons.forEach((button, i) =>
      setAttribute(button, "aria-pressed", this.sources[i] === source),
    );
    if (source) this.name.value = this.findFreeName(source.name);
    this.update();
  }

  offerPairs(chosen) {
    const options = this.getPairs().map((pair) => build("option", { value: pair.id }, pair.name));
    this.pair.replaceChildren(build("option", { value: "" }, this.t("place.new")), ...options);
    this.pair.value = chosen;
    if (this.pair.selectedIndex < 0) this.pair.value = "";
  }

  // The first side that the pair lacks.
  choosePair() {
    const pair = this.findPair();
    if (pair) this.side.value = String(findMissingSide(pair));
    this.update();
  }

  findPair() {
    return this.getPairs().find((pair) => pair.id === this.pair.value);
  }

  update() {
    const pair = this.findPair();
    const slot = Number(this.side.value);
    const isReplaced = pair && (slot ? pair.references[slot - 1] : pair.target);
    setText(this.yes, this.t(isReplaced ? "place.replace" : "place.add"));
    setHidden(this.nameField, Boolean(pair));
    this.yes.disabled = !this.chosen;
  }

  // "image", "image_2", …: no pair has the name yet.
  findFreeName(name) {
    const taken = new Set(this.getPairs().map((pair) => pair.name.toLowerCase()));
    let free = name;
    for (let n = 2; taken.has(free.toLowerCase()); n++) free = `${name}_${n}`;
    return free;
  }

  report(text) {
    setText(this.problem, text);
    setHidden(this.problem, !text);
  }

  async add() {
    const { t, chosen } = this;
    const slot = Number(this.side.value);
    const name = this.name.value.trim();
    if (!this.pair.value && !name) {
      this.report(t("place.name_missing"));
      return this.name.focus();
    }
    this.report("");
    // Not disabled meanwhile: the focus, and Escape with it, would go to the page behind.
    if (this.isBusy) return;
    this.isBusy = true;
    try {
      const answer = await chosen.add(slot, this.pair.value, name);
      await this.onadded(answer);
      if (chosen.isOnce) this.element.close();
      else if (answer.pair) {
        const side = this.side.selectedOptions[0].textContent;
        setText(this.status, t("place.added", { side, name: answer.pair.name }));
        this.offerPairs(answer.pair.id);
        this.choosePair();
      }
    } catch (error) {
      this.report(error.message);
    }
    this.isBusy = false;
    this.update();
  }
}

function findMissingSide({ target, references }) {
  return target ? Math.min(references.length + 1, MAX_REFERENCES) : 0;
}
