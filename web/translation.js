// The panel's texts in ComfyUI's language; English if there is no translation.

import { useLocale } from "./format.js";
import { EN } from "./words/en.js";
import { ZH } from "./words/zh.js";

const LANGUAGES = { en: EN, zh: ZH };
const CATEGORIES = ["zero", "one", "two", "few", "many", "other"];
const PLACE = /\{(\w+)(?::([^}]*))?\}/g;

/** As the translator that was created last: for what is older than any page, such as a client. */
export let say = (key, values) => translate(EN, createChooser("en"), key, values);

/**
 * t("job.left", { time: "3 s" }) fills {time}. {n:pair|pairs} is the form that goes with the number
 * n: one for each plural category of the language, in the order above; English has "one" and
 * "other", Chinese "other" alone. Created anew when the panel opens, so a change shows.
 */
export function createTranslator(app) {
  const locale = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  useLocale(locale);
  const language = [locale, locale.split("-")[0]].find((name) => name in LANGUAGES) ?? "en";
  const words = LANGUAGES[language];
  const choose = createChooser(language);
  say = (key, values) => translate(words, choose, key, values);
  return say;
}

function translate(words, choose, key, values = {}) {
  return (words[key] ?? EN[key] ?? key).replace(PLACE, (whole, name, forms) => {
    if (values[name] === undefined || values[name] === null) return whole;
    return forms === undefined ? values[name] : choose(forms.split("|"), Number(values[name]));
  });
}

function createChooser(language) {
  const rules = new Intl.PluralRules(language);
  const { pluralCategories: used } = rules.resolvedOptions();
  const order = CATEGORIES.filter((one) => used.includes(one));
  return (forms, number) => forms[order.indexOf(rules.select(number))] ?? forms.at(-1);
}
