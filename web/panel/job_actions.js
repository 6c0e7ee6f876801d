// The actions on a training; the server decides, and its message is shown if it refuses.

import { askToCancel, askToClone, askToDelete } from "./dialogs.js";
import { build, setHidden } from "../elements.js";

const IS_ALLOWED = {
  pause: (job) => ["pending", "in_progress"].includes(job.status) && job.request !== "pause",
  resume: (job) =>
    ["paused", "failed", "cancelled"].includes(job.status) ||
    (job.status === "in_progress" && ["pause", "cancel"].includes(job.request)),
  cancel: (job) =>
    ["pending", "in_progress", "paused"].includes(job.status) &&
    (job.request !== "cancel" || job.is_silent),
  load: (job) => (job.published ?? []).length > 0 || (job.adapters ?? []).length > 0,
  clone: () => true,
  delete: (job) => job.status !== "in_progress",
};

export class JobActions {
  // leave(): called after the job is deleted; open(id): shows another one; loadIntoGraph(name)
  constructor({ jobs, t, fail, open, leave, loadIntoGraph }) {
    Object.assign(this, { jobs, t, fail, open, leave, loadIntoGraph });
    this.buttons = {};
    for (const name of Object.keys(IS_ALLOWED)) {
      this.buttons[name] = build(
        "button",
        {
          type: "button",
          class: name === "load" ? "qel-button qel-button-primary" : "qel-button",
          "data-action": name,
          title: t(`action.${name}.title`),
          onclick: () => this.press(name),
        },
        t(`action.${name}`)
      );
    }
    this.element = build(
      "div",
      { class: "qel-job-actions", role: "group", "aria-label": t("action.group") },
      ...Object.values(this.buttons)
    );
  }

  update(job) {
    this.job = job;
    for (const [name, button] of Object.entries(this.buttons)) {
      setHidden(button, !IS_ALLOWED[name](job));
    }
  }

  async press(name) {
    const button = this.buttons[name];
    button.disabled = true;
    try {
      await this[name](this.job);
    } catch (error) {
      this.fail(error.message);
    } finally {
      button.disabled = false;
    }
  }

  pause(job) {
    return this.jobs.act(job.id, "pause");
  }

  resume(job) {
    return this.jobs.act(job.id, "resume");
  }

  async cancel(job) {
    if (await askToCancel(this.element, job, this.t)) await this.jobs.act(job.id, "cancel");
  }

  async delete(job) {
    const options = await askToDelete(this.element, job, this.t);
    if (!options) return;
    await this.jobs.act(job.id, "delete", options);
    this.leave();
  }

  async clone(job) {
    const detail = await this.jobs.show(job.id);
    const changes = await askToClone(this.element, detail, this.t);
    if (!changes) return;
    const made = await this.jobs.act(job.id, "clone", { changes });
    this.open(made.id);
  }

  // The newest LoRA; copied to the loras folder first if it is not there yet.
  async load(job) {
    let names = job.published ?? [];
    if (!names.length) names = (await this.jobs.act(job.id, "publish")).published;
    await this.loadIntoGraph(names[0]);
  }
}
