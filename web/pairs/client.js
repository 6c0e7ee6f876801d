// The server's sets of pairs. Every method throws the server's error message.

const PATH = "/qwen_edit_lora/pairs";
const JSON_HEADERS = { "Content-Type": "application/json" };
const UPLOAD_HEADERS = { "Content-Type": "application/octet-stream" };

export class PairClient {
  constructor(api) {
    this.api = api;
  }

  async list() {
    return (await this.ask("")).sets;
  }

  show(setId) {
    return this.ask(`/${setId}`);
  }

  create(name) {
    return this.post("", { name });
  }

  async listFindings(setId, pairId) {
    return (await this.ask(`/${setId}/${pairId}/findings`)).findings;
  }

  saveCaption(setId, pairId, caption, before) {
    return this.post(`/${setId}/${pairId}/caption`, { caption, before });
  }

  // {fill: text} or {trigger: text}.
  changeCaptions(setId, options) {
    return this.post(`/${setId}/captions`, options);
  }

  remove(setId, pairId) {
    return this.post(`/${setId}/${pairId}/remove`, {});
  }

  restore(setId, token) {
    return this.post(`/${setId}/restore`, { removed: token });
  }

  // Slot 0 is the target; without a pair the file's name decides which one it belongs to.
  upload(setId, file, slot, pairId = "") {
    const query = new URLSearchParams({ name: file.name, slot, pair: pairId });
    const options = { method: "POST", headers: UPLOAD_HEADERS, body: file };
    return this.ask(`/${setId}/images?${query}`, options);
  }

  getImageUrl(setId, pairId, image, side) {
    const query = new URLSearchParams({ side, v: image.version });
    return this.api.apiURL(`${PATH}/${setId}/${pairId}/images/${image.slot}?${query}`);
  }

  post(path, body) {
    const options = { method: "POST", headers: JSON_HEADERS, body: JSON.stringify(body) };
    return this.ask(path, options);
  }

  async ask(path, options = {}) {
    let response;
    try {
      response = await this.api.fetchApi(`${PATH}${path}`, { cache: "no-store", ...options });
    } catch {
      throw new Error("ComfyUI does not answer; is it still running?");
    }
    const answer = await response.json().catch(() => null);
    if (!response.ok) throw new Error(answer?.error ?? `ComfyUI answers ${response.status}`);
    return answer;
  }
}
