// Which side of a pair a dropped file is for, by its folder's name or by its own.

export const MASK = "mask"; // next to the slots: 0 for targets, 1 to 3 for references
export const MAX_REFERENCES = 3;

const TARGETS = "targets?|tgt|after|edit(?:ed|s)?|results?|outputs?|end|gt|final|dst";
const REFERENCES =
  "controls?|ctrl|sources?|src|references?|refs?|inputs?|before|originals?|orig|start|cond(?:ition)?s?";
const MASKS = "masks?";
const WORD = `(${TARGETS})|(${REFERENCES})|(${MASKS})`;

const FOLDER = new RegExp(`^(?:${WORD})[ _-]?(\\d?)$`, "i");
// "cat_before", "cat-after 2"; "before_cat". Letters only after an underscore: "cat_A", "cat_B".
const ENDING = new RegExp(`^(.+?)[ _.-]+(?:${WORD})[ _-]?(\\d?)$`, "i");
const START = new RegExp(`^(?:${WORD})(\\d?)[ _.-]+(.+)$`, "i");
const LETTER = /^(.+)[_-]([AB])$/;
const LETTER_FOLDER = /^(?:train|test)?([AB])$/;

/** The slot that a folder's name states; null for none. */
export function parseSlot(folder) {
  const match = FOLDER.exec(folder);
  return match && chooseSlot(match.slice(1));
}

/** "A" or "B", of folders that hold the images before and after; null. */
export function parseLetter(folder) {
  return LETTER_FOLDER.exec(folder)?.[1] ?? null;
}

export function getLetterSlot(letter) {
  return letter === "B" ? 0 : 1;
}

/** {base, slot} of a file's name without its ending: "cat_before" is reference 1 of "cat"; null. */
export function parseStem(stem) {
  let match = LETTER.exec(stem);
  if (match) return { base: match[1], slot: getLetterSlot(match[2]) };
  match = ENDING.exec(stem);
  if (match) return { base: match[1], slot: chooseSlot(match.slice(2)) };
  match = START.exec(stem);
  return match && { base: match[5], slot: chooseSlot(match.slice(1)) };
}

function chooseSlot([target, reference, mask, number]) {
  if (target) return 0;
  if (mask) return MASK;
  return reference ? Math.min(Math.max(Number(number || 1), 1), MAX_REFERENCES) : null;
}
