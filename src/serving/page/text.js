// An answer's text as nodes of the page: plain, or rendered by the server. HTML in it is never run.

import { word } from "./words.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Plain paragraphs and code, in order. A fence that is still open holds all that follows. */
export function plainNodes(text) {
  const nodes = [];
  let paragraph = [];
  let fence = null;
  const endParagraph = () => {
    if (paragraph.length) nodes.push(make("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  const endFence = () => {
    const properties = { className: `language-${fence.language}`, textContent: fence.lines.join("\n") };
    const code = make("code", properties);
    nodes.push(make("pre", {}, code));
    fence = null;
  };
  for (const line of text.split("\n")) {
    const found = FENCE.exec(line);
    if (fence) {
      const ends = found && !found[2] && found[1].startsWith(fence.mark);
      if (ends) endFence();
      else fence.lines.push(line);
    } else if (found) {
      endParagraph();
      fence = { mark: found[1], language: found[2], lines: [] };
    } else if (line.trim()) paragraph.push(line);
    else endParagraph();
  }
  if (fence) endFence();
  endParagraph();
  return nodes;
}

/** Words, and what stands between backticks in them. */
function inline(text) {
  const parts = text.split(/(`[^`\n]+`)/);
  return parts.map((part, i) => (i % 2 ? make("code", { textContent: part.slice(1, -1) }) : part));
}

/** The nodes of HTML from the server. Nothing in them is loaded or run before they are shown, nor then. */
export function parsedNodes(html) {
  return [...new DOMParser().parseFromString(html, "text/html").body.children];
}

/** Show blocks in `element`. Those that are shown already stay, with what a reader has selected in them. */
export function showNodes(element, nodes) {
  const shown = element.shownNodes ?? [];
  nodes.forEach((node, i) => {
    const old = element.children[i];
    if (old && shown[i].isEqualNode(node)) return;
    const made = dressed(node);
    if (!old) element.append(made);
    else if (old.className === "code" && made.className === "code") growCode(old, made);
    else old.replaceWith(made);
  });
  while (element.children.length > nodes.length) element.lastChild.remove();
  element.shownNodes = nodes;
}

/** A copy of a block in which code has its copy button, and a wide table can be scrolled. */
function dressed(node) {
  const holder = make("div", {}, node.cloneNode(true));
  for (const pre of holder.querySelectorAll("pre")) {
    const code = pre.firstChild;
    const language = make("span", { textContent: code.className.slice("language-".length) });
    const copy = copyButton(() => code.textContent);
    pre.tabIndex = 0;
    wrap(pre, "code").prepend(make("div", { className: "code-head" }, language, copy));
  }
  for (const table of holder.querySelectorAll("table")) wrap(table, "table").tabIndex = 0;
  return holder.firstChild;
}

function wrap(element, className) {
  const box = make("div", { className });
  element.replaceWith(box);
  box.append(element);
  return box;
}

/** Code that is being written keeps its place, and where it was scrolled to. */
function growCode(old, made) {
  old.querySelector(".code-head span").textContent = made.querySelector(".code-head span").textContent;
  old.querySelector("code").replaceChildren(...made.querySelector("code").childNodes);
}

export function copyButton(read) {
  const button = make("button", { type: "button", className: "quiet", textContent: word("copy") });
  button.addEventListener("click", async () => {
    const done = await copied(read());
    button.textContent = word(done ? "copied" : "cannot_copy");
    setTimeout(() => (button.textContent = word("copy")), 1500);
  });
  return button;
}

/** Whether it worked. Without TLS a browser has a clipboard for 127.0.0.1 only; the old way works there. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { value: text, className: "unseen" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}
