// The last step: a chat with base and adapter side by side, one merged model, files.

import { ask } from "./api.js";
import { attempt, bytesText, complain, follow, get } from "./jobs.js";
import { pathOf, pause, post, showProgress, work } from "./jobs.js";
import { run } from "./run.js";
import { readKey } from "./store.js";
import { state } from "./state.js";
import { byId, make } from "./text.js";
import { word } from "./words.js";

const step = byId("try");
const buttons = step.querySelector("fieldset"); // held together
const CHAT = "rwkv-miss"; // the chat page's own state
const WRITES = { merge: "merging", export: "exporting" };
let room = ""; // the run that the chat below is about
let shown = ""; // what is listed for download

export function showTry() {
  const files = run.files.filter(({ name }) => /\.(pth|gguf|safetensors)$|^run_card\.md$/.test(name));
  const [merged, whole] = ["merged.pth", "model.pth"].map((file) => files.find(({ name }) => name === file));
  showBlocked(Boolean(merged || whole));
  byId("chat-room").hidden = room !== run.name;
  const now = JSON.stringify([run.name, files, state.language]);
  if (now === shown) return; // a link keeps the focus
  shown = now;
  const rows = files.map(({ name, bytes }) => {
    const href = `${pathOf(run.name)}/files/${encodeURIComponent(name)}`;
    const link = make("a", { href, download: name, textContent: name });
    link.addEventListener("click", (event) => readKey() && fetchFile(event, link));
    return make("li", {}, link, make("small", { textContent: `${bytesText(bytes)} · ${about(name)}` }));
  });
  byId("downloads").replaceChildren(...rows);
  byId("merged").hidden = !merged;
  byId("merged").textContent = merged ? word("merged", { size: bytesText(merged.bytes) }) : "";
  const isPoor = run.verdict?.offered === false;
  byId("not-worth").hidden = !isPoor;
  byId("merge").classList.toggle("main", !isPoor);
  byId("merge").hidden = Boolean(whole);
}

/** An export that can't work is grey, with its reason beside it. */
function showBlocked(isWhole) {
  const { merge = "", export: export_ = "" } = run.blocked ?? {};
  const reasons = { merge, chat: merge, export: export_ || (isWhole ? "" : word("needs_merge")) };
  for (const [name, reason] of Object.entries(reasons)) byId(name).disabled = Boolean(reason);
  const text = [...new Set([reasons.merge, reasons.export])].filter(Boolean).join(" ");
  if (byId("blocked").textContent !== text) byId("blocked").textContent = text;
  byId("blocked").hidden = !text;
}

function about(name) {
  const kind = name.endsWith(".gguf") ? "gguf" : name.replace(/[-.].*/, "");
  return word(`file_${["adapter", "best", "merged", "model", "gguf"].includes(kind) ? kind : "other"}`);
}

/** A server with a key gives no file to a bare link. */
async function fetchFile(event, link) {
  event.preventDefault();
  await attempt(step, async () => {
    const url = URL.createObjectURL(await (await ask(link.getAttribute("href"), { method: "GET" })).blob());
    make("a", { href: url, download: link.download }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

/** A chat's page saves its state when it goes: so it goes before the next one's is made. */
function closeChat() {
  const frame = byId("chat-room").querySelector("iframe");
  const next = frame.cloneNode();
  next.removeAttribute("src");
  frame.replaceWith(next);
  [room, byId("chat-room").hidden] = ["", true];
  return next;
}

/** Close the chat if the server has another run's model by now, or none. */
export async function checkChat() {
  const mine = room;
  const trial = mine && (await get("studio/try"));
  if (!mine || room !== mine || (trial.run === mine && trial.state === "ready")) return;
  closeChat();
  complain(step, trial.error ?? word("chat_gone"));
}

async function openChat() {
  const { name } = run;
  await attempt(step, async () => {
    showProgress(step, word("loading"));
    await post(`${pathOf(name)}/try`);
    const frame = closeChat();
    let trial;
    while ((trial = await get("studio/try")).state === "loading") await pause(500);
    if (trial.state !== "ready" || trial.run !== name) throw new Error(trial.error ?? word("chat_gone"));
    const sides = ["", "adapter"].map((adapter) => ({ adapter, scale: "" }));
    sessionStorage.setItem(CHAT, JSON.stringify({ compare: true, sides, language: state.language }));
    room = name;
    byId("chat-room").hidden = room !== run?.name;
    frame.src = `try/?${Date.now()}`;
  }, buttons);
}

async function write(kind, changed, isRunning) {
  const progress = ({ progress: now }) => showProgress(step, now?.text ?? word(WRITES[kind]), now ?? {});
  showProgress(step, word(WRITES[kind]));
  const ended = () => (isRunning ? follow(kind, progress) : work(kind, { run: run.name }, progress));
  await attempt(step, ended, buttons);
  await changed();
}

export function listenToTry(changed) {
  byId("merge").addEventListener("click", () => write("merge", changed));
  byId("export").addEventListener("click", () => write("export", changed));
  byId("chat").addEventListener("click", openChat);
  for (const kind of Object.keys(WRITES)) if (state.jobs[kind]) write(kind, changed, true);
}
