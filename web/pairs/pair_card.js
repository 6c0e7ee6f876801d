// One pair: its images side by side, its caption, and what the check says about it.

import { build, buildImage, iconButton, setAttribute, setText } from "../elements.js";
import { CardFindings } from "./card_findings.js";
import { acceptDrops, chooseFiles } from "./drop_zone.js";
import { isImage, readDrop } from "./dropped_files.js";
import { MAX_REFERENCES } from "./sides.js";

const TILE_SIDE = 384; // px, of the server's thumbnails

/**
 * @param actions of the page: save(pair, text), put(pair, slot, file), remove(pair), view(pair, slot),
 *   paintMask(pair).
 * @returns {{element, update(pair, state), focusCaption()}}
 */
export function createPairCard({ client, setId, t, actions }) {
  let pair = null;
  const name = build("span", { class: "qel-pair-name" });
  const tiles = build("div", { class: "qel-pair-images" });
  const caption = build("textarea", {
    class: "qel-caption",
    rows: "3",
    placeholder: t("pairs.caption_empty"),
    spellcheck: "true",
  });
  const status = build("span", { class: "qel-caption-status", role: "status" });
  const findings = new CardFindings(t);
  const more = build("span", { class: "qel-pair-tools" });
  const mask = iconButton("palette", t("mask.edit"), () => actions.paintMask(pair), "qel-pair-mask");
  const remove = iconButton("trash", t("pairs.remove"), () => actions.remove(pair));
  const element = build(
    "div",
    { class: "qel-pair", role: "listitem" },
    build("div", { class: "qel-pair-head" }, name, status, more, mask, remove),
    tiles,
    caption,
    findings.element,
  );
  caption.addEventListener("keydown", (event) => {
    event.stopPropagation(); // ComfyUI has shortcuts of its own
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    actions.next(pair);
  });
  caption.addEventListener("input", () => actions.edit(pair, caption.value));
  caption.addEventListener("blur", () => actions.save(pair, caption.value));

  // The card may show another pair by the time that the files were read or chosen.
  async function drop(data, slot) {
    const own = pair;
    const found = await readDrop(data).catch(() => []);
    const image = found.find(({ file }) => isImage(file));
    if (image) actions.put(own, slot, image.file);
    else actions.refuse(t("pairs.no_image"));
  }

  function choose(slot) {
    const own = pair;
    chooseFiles((files) => actions.put(own, slot, files[0]), { accept: "image/*" });
  }

  function buildTile(image, slot) {
    const label = slot ? t("pairs.reference", { n: slot }) : t("pairs.target");
    const tile = build("button", {
      type: "button",
      class: "qel-pair-image",
      "data-slot": slot,
      "data-missing": !image,
      title: image ? image.file : undefined,
      "aria-label": t(image ? "pairs.view" : "pairs.add_image", { side: label, name: pair.name }),
      onclick: () => (image ? actions.view(pair, slot) : choose(slot)),
    });
    if (image) tile.append(buildPairImage(client.getImageUrl(setId, pair.id, image, TILE_SIDE), t));
    else tile.append(build("span", { class: "qel-note" }, t("pairs.missing")));
    if (slot === 0 && image && pair.mask) tile.append(buildOverlay());
    tile.append(build("span", { class: "qel-pair-side" }, label));
    acceptDrops(tile, (data) => drop(data, slot));
    return tile;
  }

  // What counts, tinted. An address of ours: it holds ids only.
  function buildOverlay() {
    const url = client.getMaskUrl(setId, pair.id, pair.mask, TILE_SIDE);
    const overlay = build("span", { class: "qel-mask-overlay", title: t("mask.overlay") });
    overlay.style.maskImage = `url("${url}")`;
    return overlay;
  }

  function drawImages() {
    mask.disabled = !pair.target;
    setAttribute(mask, "aria-pressed", Boolean(pair.mask));
    const { target, references } = pair;
    const sides = [target, ...(references.length ? references : [null])];
    tiles.replaceChildren(...sides.map((image, slot) => buildTile(image, slot)));
    const isFull = !references.length || references.length >= MAX_REFERENCES;
    more.replaceChildren(...(isFull ? [] : [buildMore(references.length + 1)]));
  }

  function buildMore(slot) {
    const side = t("pairs.reference", { n: slot });
    const label = t("pairs.add_image", { side, name: pair.name });
    const button = iconButton("plus", label, () => choose(slot), "qel-pair-more");
    acceptDrops(button, (data) => drop(data, slot));
    return button;
  }

  let drawn = null;
  return {
    element,
    update(next, { draft, saved, failure, found }) {
      pair = next;
      if (drawn?.id !== pair.id) findings.open(false);
      if (drawn !== pair) {
        drawn = pair;
        setText(name, pair.name);
        setAttribute(name, "title", pair.name);
        setAttribute(element, "aria-label", pair.name);
        setAttribute(caption, "aria-label", t("pairs.caption_of", { name: pair.name }));
        drawImages();
      }
      const text = draft ?? pair.caption;
      if (caption.value !== text && document.activeElement !== caption) caption.value = text;
      setText(status, failure ? t("pairs.not_saved") : saved ? t(`pairs.${saved}`) : "");
      setAttribute(status, "data-tone", failure ? "bad" : "");
      const problems = failure || pair.fault;
      const own = problems ? [{ severity: "error", kind: "caption", text: problems }] : [];
      findings.show([...own, ...(found ?? [])]);
    },
    focusCaption: () => caption.focus(),
  };
}

/** An image of a pair, replaced by a text where it cannot be shown. */
export function buildPairImage(src, t) {
  const look = { alt: "", loading: "lazy", decoding: "async", draggable: "false" };
  const giveUp = (image) => image.replaceWith(build("span", { class: "qel-note" }, t("pairs.broken")));
  return buildImage({ src, ...look, onfail: giveUp });
}
