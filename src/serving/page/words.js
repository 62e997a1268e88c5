// The words of a page, in the language that was chosen.

import * as common from "./common.js";
import * as own from "./translations.js";

const ENGLISH = { ...common.ENGLISH, ...own.ENGLISH };
const CHINESE = { ...common.CHINESE, ...own.CHINESE };
let chosen = ENGLISH;

export function word(name, values = {}) {
  const text = chosen[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
  return text.replace(/(?<![\d.,])1 (row|step|token)s/g, "1 $1");
}

/** What the language has for a name, if it has something. */
export const said = (name, otherwise) => chosen[name] ?? otherwise;

export function useLanguage(name) {
  chosen = name === "zh" ? CHINESE : ENGLISH;
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
  for (const [attribute, set] of [
    ["word", (element, text) => (element.textContent = text)],
    ["label", (element, text) => element.setAttribute("aria-label", text)],
    ["placeholder", (element, text) => (element.placeholder = text)],
    ["title", (element, text) => (element.title = text)],
  ]) {
    for (const element of document.querySelectorAll(`[data-${attribute}]`)) {
      set(element, word(element.dataset[attribute]));
    }
  }
}

export const languages = [ENGLISH, CHINESE];
