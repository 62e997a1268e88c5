// The last step: a chat with base and adapter side by side, one merged model, files.

import { ask } from "./api.js";
import { attempt, bytesText, follow, get, pathOf, pause, post, showProgress, work } from "./jobs.js";
import { readKey } from "./store.js";
import { state } from "./state.js";
import { byId, make } from "./text.js";
import { word } from "./words.js";

const step = byId("try");
const CHAT = "rwkv-miss"; // the chat page's own state
const WRITES = { merge: "merging", export: "exporting" };
let room = ""; // the run that the chat below is about

export function showTry(run) {
  const files = run.files.filter(({ name }) => /\.(pth|gguf|safetensors)$|^run_card\.md$/.test(name));
  const rows = files.map(({ name, bytes }) => {
    const link = make("a", { href: `${pathOf(run.name)}/files/${name}`, download: name, textContent: name });
    link.addEventListener("click", (event) => readKey() && fetchFile(event, link));
    return make("li", {}, link, make("small", { textContent: `${bytesText(bytes)} · ${about(name)}` }));
  });
  byId("downloads").replaceChildren(...rows);
  const [merged, whole] = ["merged.pth", "model.pth"].map((file) => files.find(({ name }) => name === file));
  byId("merged").hidden = !merged;
  byId("merged").textContent = merged ? word("merged", { size: bytesText(merged.bytes) }) : "";
  step.querySelector("button.main").hidden = Boolean(whole);
  byId("export").disabled = !merged && !whole;
  byId("chat-room").hidden = room !== run.name;
}

function about(name) {
  const kind = name.endsWith(".gguf") ? "gguf" : name.replace(/[-.].*/, "");
  return word(`file_${["adapter", "best", "merged", "model", "gguf"].includes(kind) ? kind : "other"}`);
}

/** A server with a key gives no file to a bare link. */
async function fetchFile(event, link) {
  event.preventDefault();
  await attempt(step, async () => {
    const url = URL.createObjectURL(await (await ask(link.getAttribute("href"))).blob());
    make("a", { href: url, download: link.download }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

async function openChat(button) {
  await attempt(step, async () => {
    showProgress(step, word("loading"));
    await post(`${pathOf(state.run)}/try`);
    let trial;
    while (!["ready", "failed"].includes((trial = await get("studio/try")).state)) await pause(500);
    if (trial.state === "failed") throw new Error(trial.error);
    const sides = ["", null].map((adapter) => ({ adapter: adapter ?? "adapter", scale: "" }));
    const chosen = { compare: true, sides, language: state.language };
    sessionStorage.setItem(CHAT, JSON.stringify(chosen));
    room = trial.run;
    byId("chat-room").hidden = false;
    byId("chat-room").querySelector("iframe").src = `try/?${Date.now()}`;
  }, button);
}

async function write(kind, changed, isRunning) {
  const progress = ({ progress: now }) => showProgress(step, now?.text ?? word(WRITES[kind]), now ?? {});
  showProgress(step, word(WRITES[kind]));
  const work_it = () => (isRunning ? follow(kind, progress) : work(kind, { run: state.run }, progress));
  await attempt(step, work_it, byId(kind) ?? step.querySelector("button.main"));
  await changed();
}

export function listenToTry(changed) {
  step.querySelector("button.main").addEventListener("click", () => write("merge", changed));
  byId("export").addEventListener("click", () => write("export", changed));
  byId("chat").addEventListener("click", ({ target }) => openChat(target));
  for (const kind of Object.keys(WRITES)) if (state.jobs[kind]) write(kind, changed, true);
}
