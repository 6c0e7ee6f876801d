// Progress of the running training in front of the browser's title, so that another tab shows it.

// ComfyUI's own title while a prompt runs: that one is left alone.
const HOST_PROGRESS = /^\[\d+%\]/;
const MAX_NAME = 30; // characters

export class ProgressTitle {
  constructor(jobs) {
    this.written = null; // the title as set here; null while there is none
    this.base = ""; // ComfyUI's title behind it
    jobs.addEventListener("change", () => this.show(describe(jobs.list())));
  }

  show(text) {
    if (document.title !== this.written) {
      this.base = document.title; // ComfyUI has set another one since
      this.written = null;
    }
    if (!text) {
      if (this.written !== null) document.title = this.base;
      this.written = null;
    } else if (!HOST_PROGRESS.test(this.base)) {
      document.title = `${text} · ${this.base}`;
      this.written = document.title; // as the browser keeps it, with single spaces
    }
  }
}

function describe(list) {
  const job = list.find(({ status }) => status === "in_progress");
  if (!job) return "";
  const name = job.name.length > MAX_NAME ? `${job.name.slice(0, MAX_NAME - 1)}…` : job.name;
  const share = job.num_steps ? Math.floor((100 * job.step) / job.num_steps) : 0;
  return `${Math.min(100, share)}% ${name}`;
}
