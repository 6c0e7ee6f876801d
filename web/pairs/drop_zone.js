// Where images are dropped or chosen: one side for targets, one for each reference.

import { build, setHidden, setText } from "../elements.js";
import { Draft, readDrop, wrapFiles } from "./dropped_files.js";
import { MAX_REFERENCES } from "./sides.js";

/** Makes an element take dropped files; `take` gets the drop's dataTransfer. */
export function acceptDrops(element, take) {
  const mark = (isOver) => element.toggleAttribute("data-over", isOver);
  element.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    mark(true);
  });
  element.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    event.dataTransfer.dropEffect = "copy";
    mark(true);
  });
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) mark(false);
  });
  element.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI would open an image as a workflow
    mark(false);
    take(event.dataTransfer);
  });
}

function hasFiles(event) {
  return [...(event.dataTransfer?.types ?? [])].includes("Files");
}

/** Opens the browser's file dialog; `take` gets a FileList. */
export function chooseFiles(take, options = {}) {
  const input = build("input", { type: "file", accept: "image/*,.txt", ...options });
  input.addEventListener("change", () => input.files.length && take(input.files));
  input.click();
}

export class DropZone {
  /**
   * @param label, confirm texts of the zone and of its button.
   * @param withName whether a name for a new set is asked for.
   * @param onconfirm (draft, name, onstep) => a promise of messages about refused files.
   */
  constructor({ t, label, confirm, withName, onconfirm }) {
    Object.assign(this, { t, onconfirm });
    this.draft = new Draft();
    this.numReferences = 1;
    this.sides = [];
    this.row = build("div", { class: "qel-sides" });
    this.more = this.button("pairs.add_side", () => this.addSide());
    this.summary = build("p", { class: "qel-note", role: "status" });
    this.failures = build("ul", { class: "qel-refused", role: "alert", hidden: true });
    this.name = withName
      ? build("input", {
          class: "qel-input",
          "aria-label": t("pairs.set_name"),
          placeholder: t("pairs.set_name"),
          spellcheck: "false",
        })
      : null;
    this.name?.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") this.confirm();
    });
    this.yes = build(
      "button",
      { type: "button", class: "qel-button qel-button-primary", onclick: () => this.confirm() },
      confirm,
    );
    this.clear = this.button("pairs.clear", () => this.reset());
    this.ready = build("div", { class: "qel-bar" }, this.name, this.yes, this.clear);
    this.element = build(
      "section",
      { class: "qel-drop", "aria-label": label },
      build("p", { class: "qel-drop-title" }, label),
      this.row,
      build("div", { class: "qel-bar" }, this.summary, this.more),
      this.ready,
      this.failures,
    );
    acceptDrops(this.element, (data) => this.take(readDrop(data), null));
    this.addSide(0);
    this.addSide(1);
    this.update();
  }

  button(key, onclick) {
    return build("button", { type: "button", class: "qel-button", onclick }, this.t(key));
  }

  addSide(slot = this.sides.length) {
    const count = build("span", { class: "qel-side-count" });
    const name = slot ? this.t("pairs.reference", { n: slot }) : this.t("pairs.target");
    const side = build(
      "button",
      {
        type: "button",
        class: "qel-side",
        "data-slot": slot,
        onclick: () =>
          chooseFiles((files) => this.take(wrapFiles(files), slot), { multiple: true }),
      },
      build("span", { class: "qel-side-name" }, name),
      count,
    );
    acceptDrops(side, (data) => this.take(readDrop(data), slot));
    this.sides.push(count);
    this.row.append(side);
    this.update();
  }

  async take(found, slot) {
    try {
      this.draft.add(await found, slot);
    } catch (error) {
      return this.refuse([error.message]); // a file that is gone or cannot be read
    }
    const last = this.draft.slots.findLastIndex((files) => files.size);
    while (this.sides.length <= last) this.addSide();
    if (this.name && !this.name.value) this.name.value = this.draft.name;
    setHidden(this.failures, true);
    this.update();
    if (this.name && !this.name.value) this.name.focus();
  }

  async confirm() {
    if (this.yes.disabled) return; // Enter, while it is uploading
    const { draft } = this;
    const name = this.name?.value.trim() ?? "";
    if (this.name && !name) {
      setText(this.summary, this.t("pairs.name_missing"));
      return this.name.focus();
    }
    this.yes.disabled = this.clear.disabled = true;
    this.summary.setAttribute("aria-live", "off"); // or each file would be read out
    let refused;
    try {
      const onstep = (n, total) => setText(this.summary, this.t("pairs.uploading", { n, total }));
      refused = await this.onconfirm(draft, name, onstep);
      this.reset();
    } catch (error) {
      refused = [error.message];
      this.update();
    }
    this.yes.disabled = this.clear.disabled = false;
    this.summary.removeAttribute("aria-live");
    this.refuse(refused);
  }

  refuse(texts) {
    this.failures.replaceChildren(...texts.map((text) => build("li", {}, text)));
    setHidden(this.failures, !texts.length);
  }

  reset() {
    this.draft.clear();
    if (this.name) this.name.value = "";
    setHidden(this.failures, true);
    this.update();
  }

  update() {
    const { t, draft } = this;
    this.sides.forEach((count, slot) => {
      const n = draft.slots[slot].size;
      setText(count, n ? t("pairs.images", { n }) : t("pairs.drop_here"));
    });
    setHidden(this.more, this.sides.length > MAX_REFERENCES);
    setHidden(this.ready, draft.isEmpty);
    const facts = [t("pairs.draft", { n: draft.numPairs })];
    if (draft.numAlone) facts.push(t("pairs.alone", { n: draft.numAlone }));
    if (draft.masks.size) facts.push(t("pairs.masks", { n: draft.masks.size }));
    if (draft.numTexts) facts.push(t("pairs.texts", { n: draft.numTexts }));
    if (draft.numSkipped) facts.push(t("pairs.skipped", { n: draft.numSkipped }));
    setText(this.summary, draft.isEmpty ? t("pairs.drop_hint") : facts.join(" · "));
  }
}
