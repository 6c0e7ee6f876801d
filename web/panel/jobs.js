// The trainings known to this page. Refreshed from the server if an event may have been missed.

import { askServer } from "../server.js";

const PATH = "/qwen_edit_lora/jobs";
const EVENT = "qwen_edit_lora.job";
// In case an event was lost on an open connection; the list is small.
const REFRESH_INTERVAL = 20_000; // ms

export const ACTIVE = new Set(["pending", "in_progress"]);
export const FINISHED = new Set(["completed", "failed", "cancelled"]);

// Events: "change" (`jobs` changed), "job" (detail: {before, job}), "warning" (text).
export class Jobs extends EventTarget {
  constructor(api) {
    super();
    this.api = api;
    this.jobs = new Map();
    this.measuring = []; // {id, name}: trainings whose estimate is measured before they start
    this.problem = null; // why the list could not be loaded
    this.isKnown = false;
    this.numRefreshes = 0;
    api.addEventListener(EVENT, ({ detail }) => this.handle(detail));
    api.addEventListener("reconnected", () => this.refresh());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.refresh();
    });
    setInterval(() => {
      if (!document.hidden) this.refresh();
    }, REFRESH_INTERVAL);
  }

  // Newest first.
  list() {
    return [...this.jobs.values()].sort(
      (a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1)
    );
  }

  countActive() {
    return [...this.jobs.values()].filter((job) => ACTIVE.has(job.status)).length;
  }

  async refresh() {
    const number = ++this.numRefreshes;
    try {
      const { jobs, measuring = [] } = await this.ask(PATH);
      if (number !== this.numRefreshes) return; // a later refresh has finished or will
      this.problem = null;
      this.measuring = measuring;
      const found = new Set(jobs.map((job) => job.id));
      for (const id of this.jobs.keys()) if (!found.has(id)) this.jobs.delete(id);
      for (const job of jobs) this.take(job);
      this.isKnown = true;
    } catch (error) {
      if (number !== this.numRefreshes) return;
      this.problem = error.message;
    }
    this.dispatchEvent(new Event("change"));
  }

  handle(detail) {
    if (detail.warning) {
      this.dispatchEvent(new CustomEvent("warning", { detail: detail.warning }));
      return;
    }
    if (detail.measuring) this.measuring = detail.measuring;
    else if (detail.deleted) this.jobs.delete(detail.id);
    else this.take(detail);
    this.dispatchEvent(new Event("change"));
  }

  take(job) {
    const before = this.jobs.get(job.id);
    this.jobs.set(job.id, job);
    this.dispatchEvent(new CustomEvent("job", { detail: { before, job, isNews: this.isKnown } }));
  }

  show(id) {
    return this.ask(`${PATH}/${id}`);
  }

  readLog(id, offset) {
    return this.ask(`${PATH}/${id}/log${offset === undefined ? "" : `?offset=${offset}`}`);
  }

  getImageUrl(id, name) {
    return this.api.apiURL(`${PATH}/${id}/pictures/${encodeURIComponent(name)}`);
  }

  // what: "samples.zip", "log.txt", or a LoRA file's name
  getDownloadUrl(id, what, isFile = false) {
    return this.api.apiURL(`${PATH}/${id}/${isFile ? "files/" : ""}${encodeURIComponent(what)}`);
  }

  async act(id, action, options = {}) {
    const answer = await this.ask(`${PATH}/${id}/${action}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(options),
    });
    if (answer.deleted) this.handle(answer);
    else if (answer.status) this.handle(answer);
    return answer;
  }

  ask(path, options) {
    return askServer(this.api, path, options);
  }
}
