// Files that a user dropped or chose, and the pairs that they form by their names.

import { getLetterSlot, MASK, MAX_REFERENCES, parseLetter, parseSlot, parseStem } from "./sides.js";

const IMAGE = /\.(png|jpe?g|jfif|webp|bmp|tiff?|gif|avif)$/i;
const TEXT = /\.(txt|caption)$/i;
const TEXT_ENDING = /[ _.-]+(captions?|prompts?|instructions?|text|txt)$/i;
const MIN_SHARE = 0.5; // of the images whose names must form pairs before names are read so

/** [{file, folders}] of a drop, files of folders included. */
export async function readDrop(dataTransfer) {
  // The items are gone after the first await.
  const entries = [...dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return wrapFiles(dataTransfer.files);
  const found = [];
  for (const entry of entries) await readEntry(entry, [], found);
  return found;
}

/** The same of an <input type="file">. */
export function wrapFiles(files) {
  return [...files].map((file) => ({
    file,
    folders: (file.webkitRelativePath || file.name).split("/").slice(0, -1),
  }));
}

async function readEntry(entry, folders, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    found.push({ file, folders });
    return;
  }
  if (entry.name.startsWith(".")) return;
  const reader = entry.createReader();
  for (;;) {
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) return; // a reader gives at most 100 entries at a time
    for (const one of part) await readEntry(one, [...folders, entry.name], found);
  }
}

export function isImage(file) {
  return IMAGE.test(file.name);
}

function getStem(name) {
  return name.replace(/\.[^.]*$/, "");
}

function fold(name) {
  return name.normalize("NFC").toLowerCase();
}

/** Files of a set to be made or extended, by slot; captions by name. */
export class Draft {
  constructor() {
    this.clear();
  }

  clear() {
    /** [{file, stem, slot, isNamed}]; slot is null where neither a side nor a folder states it. */
    this.images = [];
    this.texts = [];
    this.name = "";
    this.numOthers = 0;
    this.arrange();
  }

  /** Adds files; slot null leaves the side to their folders and names. */
  add(found, slot) {
    const letters = new Set(found.flatMap(({ folders }) => folders.map(parseLetter)));
    const isLettered = letters.has("A") && letters.has("B");
    for (const { file, folders } of found) {
      if (file.name.startsWith(".")) continue;
      const sides = folders.map((folder) => readFolder(folder, isLettered));
      const named = sides.findLast((one) => one !== null);
      const isNamed = named !== undefined;
      const one = { file, stem: getStem(file.name), slot: isNamed ? named : slot, isNamed };
      if (TEXT.test(file.name)) this.texts.push(one);
      else if (isImage(file)) this.images.push(one);
      else this.numOthers += 1;
      if (!this.name && folders.length && sides[0] === null) this.name = folders[0];
    }
    this.arrange();
  }

  arrange() {
    /** Slot -> folded name -> {file, name}. */
    this.slots = Array.from({ length: MAX_REFERENCES + 1 }, () => new Map());
    this.masks = new Map();
    this.captions = new Map();
    this.numSame = 0;
    const named = findNamedPairs(this.images);
    for (const image of this.images) {
      const { slot, name } = named.get(image) ?? { slot: image.slot ?? 0, name: image.stem };
      const files = slot === MASK ? this.masks : this.slots[slot];
      if (files.has(fold(name))) this.numSame += 1;
      else files.set(fold(name), { file: image.file, name, stem: image.stem });
    }
    for (const { file, stem } of this.texts) {
      this.captions.set(fold(stem), file);
      const base = stem.replace(TEXT_ENDING, "");
      if (base !== stem && !this.captions.has(fold(base))) this.captions.set(fold(base), file);
    }
  }

  get isEmpty() {
    return this.slots.every((files) => !files.size);
  }

  get numPairs() {
    return [...this.slots[0].keys()].filter((key) => this.slots[1].has(key)).length;
  }

  /** Names that have only one side. */
  get numAlone() {
    const names = new Set(this.slots.flatMap((files) => [...files.keys()]));
    return names.size - this.numPairs;
  }

  get numTexts() {
    return this.texts.length;
  }

  get numSkipped() {
    return this.numOthers + this.numSame;
  }

  /** [{file, name, slot, caption, mask}], targets first: a reference's pair is found by its name. */
  list() {
    return this.slots.flatMap((files, slot) =>
      [...files].map(([key, { file, name, stem }]) => ({
        ...{ file, name, slot },
        caption: slot ? undefined : (this.captions.get(key) ?? this.captions.get(fold(stem))),
        mask: slot ? undefined : (this.masks.get(key) ?? this.masks.get(fold(stem)))?.file,
      })),
    );
  }
}

function readFolder(folder, isLettered) {
  const letter = isLettered ? parseLetter(folder) : null;
  return letter ? getLetterSlot(letter) : parseSlot(folder);
}

/**
 * Images whose names form pairs, such as cat_before and cat_after: image -> {slot, name}. Empty if
 * most do not: then a name that ends so is only a name.
 */
function findNamedPairs(images) {
  const groups = new Map();
  for (const image of images) {
    const role = parseStem(image.stem);
    if (!role) continue;
    const key = fold(role.base);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push({ image, ...role });
  }
  const found = new Map();
  for (const group of groups.values()) {
    const ordered = orderGroup(group);
    for (const { image, slot, base } of ordered) found.set(image, { slot, name: base });
  }
  return found.size > images.length * MIN_SHARE ? found : new Map();
}

/** The images of one pair with their slots; empty if they are none. */
function orderGroup(group) {
  const given = group.filter(({ image }) => image.slot !== null && image.slot !== MASK);
  const kinds = new Set(given.map(({ image }) => Boolean(image.slot)));
  // Dropped on both sides, they are what the user says: perhaps the edit is learned backwards. All
  // dropped on one side, they are what their names say, unless their folder's name says otherwise.
  const isSorted = kinds.size === 2;
  const isOdd = ({ image, slot }) => image.isNamed && Boolean(image.slot) !== Boolean(slot);
  if (!isSorted && given.some(isOdd)) return [];
  const all = group.map((one) => ({ ...one, slot: (isSorted ? one.image.slot : null) ?? one.slot }));
  const references = all.filter(({ slot }) => slot !== 0 && slot !== MASK);
  const numTargets = all.filter(({ slot }) => slot === 0).length;
  if (numTargets !== 1 || !references.length || references.length > MAX_REFERENCES) return [];
  references.sort((a, b) => a.slot - b.slot || a.image.stem.localeCompare(b.image.stem));
  references.forEach((one, index) => (one.slot = index + 1));
  return all;
}

/**
 * Uploads a draft's files one after another.
 *
 * @param onstep called with (number done, number of all) after each.
 * @returns messages about the files that were refused.
 */
export async function uploadDraft(client, setId, draft, onstep) {
  const files = draft.list();
  const failures = [];
  for (const [index, { file, name, slot, caption, mask }] of files.entries()) {
    const ending = file.name.slice(getStem(file.name).length);
    try {
      const { pair } = await client.upload(setId, file, slot, "", `${name}${ending}`);
      if (caption && pair) await client.saveCaption(setId, pair.id, await caption.text(), null);
      if (mask && pair) await client.saveMask(setId, pair.id, mask);
    } catch (error) {
      failures.push(`${file.name}: ${error.message}`);
    }
    onstep(index + 1, files.length);
  }
  return failures;
}
