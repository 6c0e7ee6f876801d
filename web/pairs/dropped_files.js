// Files that a user dropped or chose: which side of a pair each is for, and its partners by name.

const IMAGE = /\.(png|jpe?g|jfif|webp|bmp|tiff?|gif|avif)$/i;
const TEXT = /\.(txt|caption)$/i;
const TARGET = /^(targets?|after|edited|results?|outputs?|end|gt)$/i;
const REFERENCE = /^(controls?|sources?|references?|refs?|inputs?|before|originals?|start)[ _-]?(\d?)$/i;

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

/** The slot that a folder's name states: 0 for targets, 1 to 3 for references; else null. */
export function parseSlot(folder) {
  if (TARGET.test(folder)) return 0;
  const match = REFERENCE.exec(folder);
  if (!match) return null;
  return Math.min(Math.max(Number(match[2] || 1), 1), 3);
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
    this.slots = [new Map(), new Map(), new Map(), new Map()]; // folded stem -> file
    this.captions = new Map();
    this.name = "";
    this.numSkipped = 0;
  }

  /** Adds files to a slot, unless a folder they are in is named for another one. */
  add(found, slot) {
    for (const { file, folders } of found) {
      if (file.name.startsWith(".")) continue;
      const named = folders.map(parseSlot).findLast((one) => one !== null);
      const key = fold(getStem(file.name));
      if (TEXT.test(file.name)) this.captions.set(key, file);
      else if (isImage(file)) this.slots[named ?? slot].set(key, file);
      else this.numSkipped += 1;
      if (!this.name && folders.length && parseSlot(folders[0]) === null) this.name = folders[0];
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

  /** [{file, slot, caption}], targets first: a reference's pair is found by its target's name. */
  list() {
    return this.slots.flatMap((files, slot) =>
      [...files].map(([key, file]) => ({
        file,
        slot,
        caption: slot === 0 ? this.captions.get(key) : undefined,
      })),
    );
  }
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
  for (const [index, { file, slot, caption }] of files.entries()) {
    try {
      const { pair } = await client.upload(setId, file, slot);
      if (caption && pair) await client.saveCaption(setId, pair.id, await caption.text(), null);
    } catch (error) {
      failures.push(`${file.name}: ${error.message}`);
    }
    onstep(index + 1, files.length);
  }
  return failures;
}
