// Words and numbers in the language that is chosen; words.json has them all.
import { all } from "./elements.js";

let words = {};
let language = "en";

/** Fetches the words and chooses the reader's language. */
export async function loadWords() {
  words = await (await fetch("static/words.json")).json();
  const known = localStorage.getItem("language") ?? navigator.language.slice(0, 2);
  return known in words ? known : "en";
}

export function setLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen;
}

export function word(key, values = {}) {
  const text = words[language]?.[key] ?? "";
  return typeof text === "string" ? text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "") : text;
}

export const number = (value, places = 0) =>
  value.toLocaleString(language, { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
export const named = (target) => target.replace(/(\d)keV/g, "$1 keV");
export const time = (iso) => new Date(iso).toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
export function bytes(count) {
  const power = Math.min(3, Math.floor(Math.log10(Math.max(count, 1)) / 3));
  return `${number(count / 1000 ** power, power && count / 1000 ** power < 10 ? 1 : 0)} ${["B", "kB", "MB", "GB"][power]}`;
}

/** Puts its words into every element that names them. */
export function translate() {
  for (const one of all("[data-word]")) one.textContent = word(one.dataset.word, one.dataset);
  for (const one of all("[data-label]")) one.setAttribute("aria-label", word(one.dataset.label));
}

/** A warning in the reader's language where the words have its pattern, and the language that it is in. */
export function translated(line) {
  for (const [pattern, text] of words[language].lines) {
    const found = new RegExp(`^${pattern}$`);
    if (found.test(line)) return [line.replace(found, text), language];
  }
  return [line, "en"];
}
