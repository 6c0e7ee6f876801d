// The sets of pairs as cards, and the place to drop images for a new one.

import { build, iconButton, KeyedRows, setAttribute, setHidden, setText } from "../elements.js";
import { formatSize } from "../format.js";
import { createCacheBar, createTrashBar } from "./disk_bar.js";
import { DropZone } from "./drop_zone.js";
import { uploadDraft } from "./dropped_files.js";

const COVER_SIDE = 384; // px, of the server's thumbnails

export class SetList {
  constructor({ client, t, open }) {
    Object.assign(this, { client, t, open });
    this.sets = [];
    this.isKnown = false;
    this.problem = "";
    this.isGone = false;
    this.summary = build("span", { class: "qel-note", role: "status" });
    this.message = build("p", { class: "qel-empty" });
    this.items = build("ul", { class: "qel-sets", "aria-label": t("pairs.sets") });
    this.rows = new KeyedRows(this.items, (set) => this.buildCard(set));
    this.zone = new DropZone({
      t,
      label: t("pairs.drop_title"),
      confirm: t("pairs.make"),
      withName: true,
      onconfirm: (draft, name, onstep) => this.make(draft, name, onstep),
    });
    const onremoved = () => this.load();
    this.cache = createCacheBar({ client, t, onremoved });
    this.trash = createTrashBar({ client, t, onremoved });
    this.element = build(
      "div",
      { class: "qel-view qel-pairs" },
      build(
        "div",
        { class: "qel-bar" },
        this.summary,
        iconButton("refresh", t("pairs.refresh"), () => this.load()),
      ),
      this.message,
      this.items,
      this.zone.element,
      this.cache.element,
      this.trash.element,
    );
    this.draw();
    this.load();
  }

  destroy() {
    this.isGone = true;
  }

  async load() {
    try {
      this.sets = await this.client.list();
      this.isKnown = true;
      this.problem = "";
    } catch (error) {
      this.problem = error.message;
    }
    if (this.isGone) return;
    this.draw();
    await Promise.all([this.cache.load(), this.trash.load()]);
  }

  // A set that was made stays if some of its files are refused: their messages are shown here.
  async make(draft, name, onstep) {
    const set = await this.client.create(name);
    const failures = await uploadDraft(this.client, set.id, draft, onstep);
    await this.load();
    if (!failures.length && !this.isGone) this.open(set.id);
    return failures;
  }

  draw() {
    const { t } = this;
    this.rows.show(this.sets, (set) => set.id);
    setText(this.summary, this.isKnown ? t("pairs.summary", { n: this.sets.length }) : "");
    setHidden(this.message, this.sets.length > 0 && !this.problem);
    const text = this.isKnown ? t("pairs.none") : t("pairs.loading");
    setText(this.message, this.problem || text);
    setAttribute(this.message, "data-tone", this.problem ? "bad" : "");
  }

  buildCard(first) {
    const { t } = this;
    const covers = build("span", { class: "qel-covers", "aria-hidden": "true" });
    const name = build("span", { class: "qel-set-name" });
    const facts = build("span", { class: "qel-note" });
    const button = build(
      "button",
      { type: "button", class: "qel-set", onclick: () => this.open(first.id) },
      name,
      covers,
      facts,
    );
    return {
      element: build("li", {}, button),
      update: (set) => {
        setText(name, set.name);
        setText(facts, set.problem ?? describeSet(set, t));
        setAttribute(facts, "data-tone", set.problem ? "bad" : "");
        button.disabled = Boolean(set.problem);
        const images = (set.covers ?? []).map((cover) => {
          const src = this.client.getImageUrl(set.id, cover.pair, cover, COVER_SIDE);
          return build("img", { src, alt: "", loading: "lazy", decoding: "async" });
        });
        covers.replaceChildren(...images);
      },
    };
  }
}

/** "12 pairs · 3 without a caption · 80 MB encoded". */
export function describeSet(set, t) {
  const facts = [t("pairs.count", { n: set.num_pairs })];
  if (set.num_uncaptioned) facts.push(t("pairs.uncaptioned", { n: set.num_uncaptioned }));
  if (set.num_incomplete) facts.push(t("pairs.incomplete", { n: set.num_incomplete }));
  if (set.cached_bytes) facts.push(t("pairs.cached", { size: formatSize(set.cached_bytes) }));
  return facts.join(" · ");
}
