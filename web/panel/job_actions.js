// The actions on a training: the server lists those that a job allows, and its message is shown if
// it refuses one after all.

import { askToCancel, askToClone, askToDelete } from "./dialogs.js";
import { build, setAttribute, setHidden, setText } from "../elements.js";

// Button, in order -> the server's action that it needs.
const NEEDS = {
  pause: "pause",
  resume: "resume",
  sample: "sample",
  save: "save",
  cancel: "cancel",
  load: "publish",
  clone: "clone",
  delete: "delete",
};

// What a worker does after its next step: until then the button says that it was asked.
const ORDERS = ["sample", "save"];

export class JobActions {
  // leave(): called after the job is deleted; open(id): shows another one; loadIntoGraph(name)
  constructor({ jobs, t, fail, open, leave, loadIntoGraph }) {
    Object.assign(this, { jobs, t, fail, open, leave, loadIntoGraph });
    this.buttons = {};
    for (const name of Object.keys(NEEDS)) {
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
      setHidden(button, !job.actions.includes(NEEDS[name]) && !job.orders?.includes(name));
    }
    for (const name of ORDERS) {
      const isGiven = Boolean(job.orders?.includes(name));
      setText(this.buttons[name], this.t(isGiven ? "action.ordered" : `action.${name}`));
      setAttribute(this.buttons[name], "aria-disabled", isGiven); // and keeps the focus
    }
  }

  async press(name) {
    const button = this.buttons[name];
    if (button.getAttribute("aria-disabled") === "true") return;
    this.fail("");
    button.disabled = !ORDERS.includes(name); // an order's button stays, with the focus
    try {
      if (this[name]) await this[name](this.job);
      else await this.jobs.act(this.job.id, name);
    } catch (error) {
      this.fail(error.message);
    } finally {
      button.disabled = false;
    }
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
    let [changes, problem, made] = [{}, "", null];
    while (!made) {
      changes = await askToClone(this.element, detail, this.t, changes, problem);
      if (!changes) return;
      try {
        made = await this.jobs.act(job.id, "clone", { changes });
      } catch (error) {
        problem = error.message; // asked again, with what was entered
      }
    }
    this.open(made.id);
  }

  // The newest LoRA; copied to the loras folder first if it is not there yet.
  async load(job) {
    let names = job.published ?? [];
    if (!names.length) names = (await this.jobs.act(job.id, "publish")).published;
    await this.loadIntoGraph(names[0]);
  }
}
