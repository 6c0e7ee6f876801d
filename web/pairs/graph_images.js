// Images that ComfyUI's last runs produced, as its history names them.

import { askServer } from "../server.js";

const MAX_RUNS = 64;
const MAX_IMAGES = 120;
const FOLDERS = ["output", "temp"]; // what a LoadImage shows is in "input"

/** @returns [{filename, subfolder, type}], the newest first; throws if ComfyUI does not answer. */
export async function listGraphImages(api) {
  const runs = Object.values(await askServer(api, `/history?max_items=${MAX_RUNS}`)).reverse();
  const found = new Map();
  for (const run of runs) {
    for (const output of Object.values(run.outputs ?? {}).reverse()) {
      for (const image of output.images ?? []) {
        const { filename, subfolder = "", type } = image ?? {};
        if (typeof filename !== "string" || !FOLDERS.includes(type)) continue;
        found.set(`${type}/${subfolder}/${filename}`, { filename, subfolder, type });
        if (found.size >= MAX_IMAGES) return [...found.values()];
      }
    }
  }
  return [...found.values()];
}

export function getGraphImageUrl(api, image) {
  return api.apiURL(`/view?${new URLSearchParams({ ...image, preview: "webp;75" })}`);
}
