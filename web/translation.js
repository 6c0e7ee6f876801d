// The panel's texts in ComfyUI's language; English if there is no translation.

import { useLocale } from "./format.js";
import { EN } from "./words/en.js";
import { ZH } from "./words/zh.js";

const LANGUAGES = { en: EN, zh: ZH };

// t("job.left", { time: "3 s" }) fills {time}. Created anew when the panel opens, so a change shows.
export function createTranslator(app) {
  const locale = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  useLocale(locale);
  const words = LANGUAGES[locale] ?? LANGUAGES[locale.split("-")[0]] ?? EN;
  return (key, values = {}) =>
    (words[key] ?? EN[key] ?? key).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
