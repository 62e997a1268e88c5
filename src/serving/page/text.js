// An answer's text as nodes of the page. Text becomes text: nothing of it is ever read as HTML.

import { word } from "./translations.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Paragraphs and code, in order: {code, language, text}. A fence that is still open holds all that follows. */
export function blocksOf(text) {
  const blocks = [];
  let paragraph = [];
  let fence = null;
  const endParagraph = () => {
    if (paragraph.length) blocks.push({ code: false, language: "", text: paragraph.join("\n") });
    paragraph = [];
  };
  for (const line of text.split("\n")) {
    const found = FENCE.exec(line);
    if (fence) {
      const ends = found && !found[2] && found[1][0] === fence.mark[0] && found[1].length >= fence.mark.length;
      if (ends) fence = null;
      else fence.lines.push(line);
      if (fence) fence.block.text = fence.lines.join("\n");
    } else if (found) {
      endParagraph();
      fence = { mark: found[1], lines: [], block: { code: true, language: found[2], text: "" } };
      blocks.push(fence.block);
    } else if (line.trim()) paragraph.push(line);
    else endParagraph();
  }
  endParagraph();
  return blocks;
}

/** Shows `text` in `element`. Blocks that are shown already stay, with what a reader has selected in them. */
export function showText(element, text) {
  const blocks = blocksOf(text);
  const shown = element.shownBlocks ?? [];
  blocks.forEach((block, i) => {
    const old = shown[i];
    if (old && old.code === block.code && old.language === block.language && old.text === block.text) return;
    if (old?.code && block.code && old.language === block.language) {
      element.children[i].querySelector("code").textContent = block.text;
    } else {
      const made = block.code ? codeBlock(block) : make("p", {}, ...inline(block.text));
      if (old) element.children[i].replaceWith(made);
      else element.append(made);
    }
  });
  while (element.children.length > blocks.length) element.lastChild.remove();
  element.shownBlocks = blocks;
}

function codeBlock({ language, text }) {
  const code = make("code", { textContent: text });
  const copy = copyButton(() => code.textContent);
  const head = make("div", { className: "code-head" }, make("span", { textContent: language }), copy);
  return make("div", { className: "code" }, head, make("pre", { tabIndex: 0 }, code));
}

/** Words, and what stands between backticks in them. */
function inline(text) {
  return text.split(/(`[^`\n]+`)/).map((part, i) => (i % 2 ? make("code", { textContent: part.slice(1, -1) }) : part));
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
