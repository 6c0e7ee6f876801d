// The server's sets of pairs. Every method throws the server's error message.

import { askServer } from "../server.js";

const ROOT = "/qwen_edit_lora";
const PATH = `${ROOT}/pairs`;
const JSON_HEADERS = { "Content-Type": "application/json" };
const UPLOAD_HEADERS = { "Content-Type": "application/octet-stream" };

export class PairClient {
  constructor(api) {
    this.api = api;
  }

  async list() {
    return (await this.ask("/pairs")).sets;
  }

  show(setId) {
    return this.ask(`/pairs/${setId}`);
  }

  measureCache() {
    return this.ask("/pair_cache");
  }

  cleanCache() {
    return this.post("/pair_cache/clean", {});
  }

  create(name) {
    return this.post("/pairs", { name });
  }

  async listFindings(setId, pairId) {
    return (await this.ask(`/pairs/${setId}/${pairId}/findings`)).findings;
  }

  saveCaption(setId, pairId, caption, before) {
    return this.post(`/pairs/${setId}/${pairId}/caption`, { caption, before });
  }

  // {fill: text} or {trigger: text}.
  changeCaptions(setId, options) {
    return this.post(`/pairs/${setId}/captions`, options);
  }

  remove(setId, pairId) {
    return this.post(`/pairs/${setId}/${pairId}/remove`, {});
  }

  measureTrash() {
    return this.ask("/pair_trash");
  }

  emptyTrash() {
    return this.post("/pair_trash/empty", {});
  }

  restore(setId, token) {
    return this.post(`/pairs/${setId}/restore`, { removed: token });
  }

  // Slot 0 is the target; without a pair the name decides which one the file belongs to.
  upload(setId, file, slot, pairId = "", name = file.name) {
    const query = new URLSearchParams({ name, slot, pair: pairId });
    return this.send(`/pairs/${setId}/images?${query}`, file);
  }

  saveMask(setId, pairId, file) {
    return this.send(`/pairs/${setId}/${pairId}/mask`, file);
  }

  removeMask(setId, pairId) {
    return this.post(`/pairs/${setId}/${pairId}/mask/remove`, {});
  }

  /** @param output {filename, subfolder, type} as ComfyUI's history names an image. */
  addOutput(setId, output, slot, pairId, name) {
    return this.post(`/pairs/${setId}/outputs`, { ...output, slot, pair: pairId, name });
  }

  getMaskUrl(setId, pairId, mask, side) {
    const query = new URLSearchParams({ side, v: mask.version });
    return this.api.apiURL(`${PATH}/${setId}/${pairId}/mask?${query}`);
  }

  getImageUrl(setId, pairId, image, side) {
    const query = new URLSearchParams({ side, v: image.version });
    return this.api.apiURL(`${PATH}/${setId}/${pairId}/images/${image.slot}?${query}`);
  }

  send(path, file) {
    return this.ask(path, { method: "POST", headers: UPLOAD_HEADERS, body: file });
  }

  post(path, body) {
    // keepalive: a caption that is saved as the page closes still arrives.
    const options = { method: "POST", headers: JSON_HEADERS, keepalive: true };
    options.body = JSON.stringify(body);
    return this.ask(path, options);
  }

  ask(path, options) {
    return askServer(this.api, `${ROOT}${path}`, options);
  }
}
