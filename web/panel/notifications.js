// Toasts: a training finished or failed, a warning, a prompt that runs during a training.

import { notifyDesktop } from "./desktop_notifications.js";
import { FINISHED } from "./jobs.js";

const SEEN_KEY = "qwen_edit_lora.seen_until"; // in localStorage: end of the last training shown
const MAX_NAMES = 5;
const LIFE = { info: 6000, success: 10_000, warn: 15_000, error: undefined }; // ms; an error stays

export function announce(app, jobs, t) {
  const add = (severity, summary, detail) =>
    app.extensionManager.toast.add({ severity, summary, detail, life: LIFE[severity] });

  // In the page, and outside of it for someone who does something else meanwhile.
  const tell = (severity, key, job, text) => {
    add(severity, t(key, { name: job.name }), text);
    notifyDesktop(t(key, { name: job.name }), text, `qwen_edit_lora ${job.id}`);
  };

  jobs.addEventListener("warning", ({ detail }) => add("warn", t("toast.beside"), detail));

  jobs.addEventListener("job", ({ detail: { before, job, isNews } }) => {
    if (!isNews) return; // found at page load; announceAbsence reports these
    const alarms = (job.alarms ?? []).slice(before?.alarms?.length ?? 0);
    for (const alarm of alarms) add("warn", t("toast.alarm", { name: job.name }), alarm);
    if (!FINISHED.has(job.status) || before?.status === job.status) return;
    markSeen(job);
    if (job.status === "completed") {
      const files = (job.published ?? []).join(", ");
      tell("success", "toast.completed", job, files || t("toast.noFile"));
    } else if (job.status === "failed") {
      tell("error", "toast.failed", job, job.failure?.sentence ?? "");
    }
  });

  const announceOnce = () => {
    if (!jobs.isKnown) return;
    jobs.removeEventListener("change", announceOnce);
    announceAbsence(jobs, add, t);
  };
  jobs.addEventListener("change", announceOnce);
}

// Reports trainings that ended while no page was open.
function announceAbsence(jobs, add, t) {
  const seen = readSeen();
  const ended = jobs.list().filter((job) => FINISHED.has(job.status) && job.ended_at);
  const unseen = seen === null ? [] : ended.filter((job) => job.ended_at > seen);
  ended.forEach(markSeen);
  if (seen === null && !ended.length) writeSeen(0); // from now on everything is news
  const names = (status) => unseen.filter((job) => job.status === status).map((job) => job.name);
  const [completed, failed] = [names("completed"), names("failed")];
  if (completed.length) add("success", t("toast.completedMeanwhile"), shorten(completed, t));
  if (failed.length) add("error", t("toast.failedMeanwhile"), shorten(failed, t));
}

function shorten(names, t) {
  const shown = names.slice(0, MAX_NAMES).join(", ");
  const rest = names.length - MAX_NAMES;
  return rest > 0 ? t("toast.more", { names: shown, n: rest }) : shown;
}

function markSeen(job) {
  if (job.ended_at > (readSeen() ?? 0)) writeSeen(job.ended_at);
}

function readSeen() {
  const text = localStorage.getItem(SEEN_KEY);
  return text === null ? null : Number(text);
}

function writeSeen(time) {
  localStorage.setItem(SEEN_KEY, String(time));
}
