// Where each sample image is: a row per item, its source and target first, then a column per step.

const ORDER = { source: 0, target: 1, sample: 2 };

/** Columns as keys in their order, and of each item its images by column. */
export function arrange(images) {
  const sorted = [...images].sort(compareImages);
  const getKey = ({ kind, step, index }) => `${kind} ${kind === "sample" ? step : (index ?? 0)}`;
  const columns = [...new Set(sorted.map(getKey))];
  const items = new Map(images.map(({ item }) => [item, new Map()]));
  for (const image of sorted) items.get(image.item).set(getKey(image), image);
  return { columns, items };
}

function compareImages(a, b) {
  return ORDER[a.kind] - ORDER[b.kind] || (a.step ?? a.index ?? 0) - (b.step ?? b.index ?? 0);
}

/** The image so many rows and columns away; gaps are passed over, and past an end there is none. */
export function findNeighbor(cells, name, rows, columns) {
  let row = cells.findIndex((images) => images.some((one) => one?.name === name));
  let column = cells[row]?.findIndex((one) => one?.name === name);
  while (row >= 0) {
    [row, column] = [row + rows, column + columns];
    const images = cells[row];
    if (!images || !(column in images)) return null;
    if (images[column]) return images[column];
    const nearest = rows && images.slice(0, column).findLast(Boolean);
    if (nearest) return nearest;
  }
  return null;
}
