// Text files beside a message: read in the browser, and put before it under their names.

import { make } from "./text.js";
import { word } from "./words.js";

const MOST_BYTES = 256 * 1024;

/** {name, text} of a file. Throws an Error that says what is wrong with it. */
export async function readFile(file) {
  const { name } = file;
  if (file.size > MOST_BYTES) throw new Error(word("large_file", { name, most: sizeOf(MOST_BYTES) }));
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return { name, text };
  } catch {
    // it is no UTF-8, or can't be read
  }
  throw new Error(word("no_text", { name }));
}

/** A turn as the model reads it. No fence within a file ends its own. */
export function contentOf({ text, files = [] }) {
  const blocks = files.map((file) => {
    const longest = Math.max(2, ...(file.text.match(/`+/g) ?? []).map((mark) => mark.length));
    const fence = "`".repeat(longest + 1);
    return `${file.name}:\n${fence}\n${file.text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...blocks, text].filter(Boolean).join("\n\n");
}

/** The files of a draft, each with a button that takes it away. */
export function draftChips(files, remove) {
  return files.map((file) => {
    const button = make("button", { type: "button", className: "quiet", textContent: "×" });
    button.ariaLabel = word("remove", { name: file.name });
    button.addEventListener("click", () => remove(file));
    return make("li", { className: "chip" }, make("span", { textContent: titleOf(file) }), button);
  });
}

/** The files of a turn, each of which can be opened. */
export function fileViews(files) {
  return files.map((file) => {
    const summary = make("summary", { textContent: titleOf(file) });
    const text = make("pre", { textContent: file.text, tabIndex: 0 });
    return make("details", { className: "file" }, summary, text);
  });
}

function titleOf({ name, text }) {
  return `${name} · ${sizeOf(new Blob([text]).size)}`;
}

const sizeOf = (bytes) => (bytes < 1024 ? `${bytes} B` : `${Math.round(bytes / 1024)} KiB`);
