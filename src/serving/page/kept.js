// Conversations that are kept in this browser, and their files. Nothing is kept before the reader says so.

import { contentOf } from "./files.js";
import { readTurn } from "./store.js";
import { word } from "./words.js";

const KEEP = "rwkv-miss-keep";
const PREFIX = "rwkv-miss-chat-";
const FORMAT = "rwkv-miss-conversations";

export const keeps = () => localStorage.getItem(KEEP) === "yes";
export const setKeeps = (on) => (on ? localStorage.setItem(KEEP, "yes") : localStorage.removeItem(KEEP));
export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
export const isKept = (id) => localStorage.getItem(PREFIX + id) !== null;
export const drop = (id) => localStorage.removeItem(PREFIX + id);

/** The conversations that have all words of `query` in them, the newest first. */
export function kept(query = "") {
  const words = query.toLowerCase().split(/\s+/);
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .flatMap((key) => readConversation(localStorage.getItem(key)))
    .filter((conversation) => {
      const text = query && asMarkdown(conversation).toLowerCase();
      return !query || words.every((part) => text.includes(part));
    })
    .sort((one, other) => other.changed - one.changed);
}

function readConversation(text) {
  try {
    return [checked(JSON.parse(text))];
  } catch {
    return []; // of another version
  }
}

function checked({ id, changed, system, tools, turns }) {
  const isText = (value) => typeof value === "string";
  if (![id, system, tools].every(isText)) throw new TypeError("no conversation");
  return { id, changed: Number(changed) || Date.now(), system, tools, turns: turns.map(readTurn) };
}

/** Keep a conversation as it is now. False where the browser has no more room. */
export function keep({ id, system, tools, turns }, changed = Date.now()) {
  const old = JSON.parse(localStorage.getItem(PREFIX + id) ?? "{}");
  const now = { id, changed: old.changed, system, tools, turns };
  if (JSON.stringify(now) === JSON.stringify(old)) return true; // it was only looked at
  try {
    localStorage.setItem(PREFIX + id, JSON.stringify({ ...now, changed }));
    return true;
  } catch {
    return false;
  }
}

/** What a conversation is called: by its first words. */
export function titleOf({ turns }) {
  const first = turns[0]?.text.trim() || turns[0]?.files[0]?.name || "";
  return first.split("\n")[0].slice(0, 80);
}

export function asJson(conversations) {
  return JSON.stringify({ format: FORMAT, conversations: conversations.map(checked) }, null, 1);
}

/** Keep the conversations of a file; returns them. Throws an Error for another file, or without room. */
export function keepFile(text) {
  let conversations;
  try {
    const file = JSON.parse(text);
    conversations = file.format === FORMAT && file.conversations.map(checked);
  } catch {
    conversations = false;
  }
  if (!conversations) throw new Error(word("wrong_import"));
  for (const conversation of conversations) {
    const { id, turns } = conversation;
    const [same] = readConversation(localStorage.getItem(PREFIX + id));
    if (same && JSON.stringify(same.turns) === JSON.stringify(turns)) continue;
    if (same || !id) conversation.id = newId(); // both are kept
    if (!keep(conversation, conversation.changed)) throw new Error(word("no_room"));
  }
  return conversations;
}

export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system.trim()) parts.push(`## ${word("system")}`, conversation.system);
  for (const turn of conversation.turns) {
    parts.push(`## ${word("you")}`, contentOf(turn));
    for (const { label, content, calls } of turn.answers) {
      parts.push(`## ${label}`, content);
      for (const call of calls) {
        parts.push(`${word("calls", call)}:`, `\`\`\`json\n${call.arguments}\n\`\`\``);
      }
    }
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}
