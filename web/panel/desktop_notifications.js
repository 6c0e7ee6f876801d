// The browser's notifications outside its window: off until the user switches them on here.

import { build, setHidden, setText } from "../elements.js";

const KEY = "qwen_edit_lora.notify"; // in localStorage: "on" or "off"

function isOn() {
  return (
    "Notification" in window &&
    localStorage.getItem(KEY) === "on" &&
    Notification.permission === "granted"
  );
}

/** A notification, if the user has switched them on; `tag`: another page's of the same is one. */
export function notifyDesktop(title, body, tag) {
  if (!isOn()) return;
  try {
    const notification = new Notification(title, { body, tag });
    notification.onclick = () => window.focus();
  } catch {
    // Some browsers of phones offer the permission, but no notifications to pages.
  }
}

/** The switch. The browser is asked for its permission only when it is pressed, and only once. */
export function createNotificationSwitch(t) {
  const input = build("input", { type: "checkbox", role: "switch" });
  const problem = build("p", { class: "qel-note", role: "status" });
  const element = build(
    "div",
    { class: "qel-notify" },
    build("label", { class: "qel-check" }, input, t("notify.switch")),
    problem
  );
  input.checked = isOn();
  setHidden(problem, true);
  setHidden(element, !("Notification" in window));
  input.addEventListener("change", async () => {
    localStorage.setItem(KEY, input.checked ? "on" : "off");
    if (input.checked && Notification.permission === "default") {
      await Notification.requestPermission();
    }
    const isRefused = input.checked && Notification.permission !== "granted";
    if (isRefused) localStorage.setItem(KEY, "off");
    input.checked = isOn();
    setHidden(problem, !isRefused);
    setText(problem, isRefused ? t(window.isSecureContext ? "notify.denied" : "notify.insecure") : "");
  });
  return element;
}
