// Markdown by the server: when it is asked, and what is shown until it has answered.

import { renderMarkdown } from "./api.js";
import { keepingEnd } from "./scrolling.js";
import { parsedNodes, plainNodes, showNodes } from "./text.js";

// milliseconds between two requests for a text that grows, or four times as long as one took
const PAUSE = 200;
const LONGEST_PAUSE = 3000;
const MOST = 200_000; // characters
const KEPT = 300; // texts
const rendered = new Map(); // whole text -> its HTML
let renders = true;

/** Whether the server renders: /v1/server says so. */
export function useRenderer(does) {
  renders = does;
}

async function htmlOf(text, unfinished) {
  if (!renders || text.length > MOST) return null;
  if (rendered.has(text)) return rendered.get(text);
  try {
    const html = await renderMarkdown(text, unfinished);
    if (!unfinished) rendered.set(text, html);
    if (rendered.size > KEPT) rendered.delete(rendered.keys().next().value);
    return html;
  } catch (error) {
    if (error.status === 501) renders = false;
    return null;
  }
}

/** A function that shows a text in `element`, as it is now. One request at a time is under way. */
export function markdownView(element) {
  let wanted = null;
  let last = {};
  let busy = false;
  let isPlain = true; // until the server has rendered something
  let next = 0; // when it may be asked again
  let timer = 0;

  function show(nodes, plain) {
    isPlain = plain;
    keepingEnd(() => {
      element.classList.toggle("plain", plain);
      showNodes(element, nodes);
    });
  }

  async function work() {
    clearTimeout(timer);
    if (busy || !wanted) return;
    const wait = wanted.unfinished ? next - performance.now() : 0;
    if (wait > 0) {
      timer = setTimeout(work, wait);
      return;
    }
    const { text, unfinished } = wanted;
    const began = performance.now();
    wanted = null;
    busy = true;
    const html = await htmlOf(text, unfinished);
    busy = false;
    if (!last.text) return;
    if (html !== null) show(parsedNodes(html), false);
    else show(plainNodes(last.text), true);
    const now = performance.now();
    next = now + Math.min(Math.max(PAUSE, 4 * (now - began)), LONGEST_PAUSE);
    work();
  }

  return (text, unfinished) => {
    if (text === last.text && unfinished === last.unfinished) return;
    last = { text, unfinished };
    wanted = text ? last : null; // the reply for an empty text would come after the first words, and hide them
    if (!text || (isPlain && !rendered.has(text))) show(plainNodes(text), true);
    work();
  };
}
