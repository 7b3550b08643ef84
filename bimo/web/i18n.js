// The page's words in Chinese and English: locales/{zh,en}.json, flat keys, the same in both (tests compare them).
//
//   t("sidebar.search")                      a plain sentence
//   t("error.busy", { seconds: 3 })          "{seconds}" is filled in
//   t("stats.tokens", { count: 1 })          "stats.tokens.one" or ".other", by the language's plural rule
//
// Components that call `t` while rendering follow a change of language by themselves: it reads signals.

import { computed, effect, signal } from "./ui.js";
import { languageChoice } from "./preferences.js";

const browserLanguage = signal(navigator.language || "en");
window.addEventListener("languagechange", () => (browserLanguage.value = navigator.language || "en"));

/** "zh" or "en": what the user chose, or what the browser speaks. */
export const language = computed(() => {
  const wanted = languageChoice.value === "auto" ? browserLanguage.value : languageChoice.value;
  return /^zh/i.test(wanted) ? "zh" : "en";
});

/** The same as a BCP 47 tag, for `lang` and Intl. */
export const languageTag = computed(() => (language.value === "zh" ? "zh-CN" : "en"));

const words = signal({ language: "", table: {} });
const fetched = new Map();

function load(name) {
  if (!fetched.has(name)) {
    const request = fetch(`/static/locales/${name}.json`).then((response) => {
      if (!response.ok) throw new Error(`locales/${name}.json: HTTP ${response.status}`);
      return response.json();
    });
    request.catch(() => fetched.delete(name)); // a later switch tries again
    fetched.set(name, request);
  }
  return fetched.get(name);
}

/** Fetch the current language's words; the page is drawn after this. */
export async function loadWords() {
  const name = language.value;
  const table = await load(name);
  if (language.value === name) words.value = { language: name, table };
}

effect(() => {
  const name = language.value;
  if (words.peek().language && words.peek().language !== name) loadWords().catch(() => {});
});

effect(() => {
  // The attribute follows the words, not the wish: a screen reader must not read English with a Chinese voice.
  if (words.value.language) document.documentElement.lang = words.value.language === "zh" ? "zh-CN" : "en";
});

const plurals = computed(() => new Intl.PluralRules(languageTag.value));

/** The sentence for `key` in the current language; the key itself when it is missing, so that a gap is seen. */
export function t(key, parameters) {
  const table = words.value.table;
  let text = table[key];
  if (text === undefined && parameters && "count" in parameters) {
    text = table[`${key}.${plurals.value.select(parameters.count)}`] ?? table[`${key}.other`];
  }
  if (text === undefined) return key;
  if (!parameters) return text;
  return text.replace(/\{(\w+)\}/g, (whole, name) =>
    name in parameters ? (typeof parameters[name] === "number" ? number(parameters[name]) : parameters[name]) : whole,
  );
}

/** `value` as the language writes it, with at most `digits` decimals. */
export function number(value, digits = 1) {
  return new Intl.NumberFormat(languageTag.value, { maximumFractionDigits: digits }).format(value);
}

/** A list of strings kept in the table, such as the example prompts. */
export function list(key) {
  const value = words.value.table[key];
  return Array.isArray(value) ? value : [];
}
