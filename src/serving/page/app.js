// The chat page: what happens when.

import { describeServer } from "./api.js";
import { fill, newAnswer, requestOf } from "./answers.js";
import { listenToSettings, showSettings, wrongNumber } from "./settings.js";
import { keepKey, readKey, restore, save, state } from "./store.js";
import { grow, onEnter, showTurns } from "./turns.js";
import { useLanguage, word } from "./translations.js";

const byId = (id) => document.getElementById(id);
const [log, draft, problem, settings] = ["log", "draft", "problem", "settings"].map(byId);
let server = null; // what /v1/server said
let running = null; // the AbortController of the answers that are being written
let views = [];

const actions = {
  retry: () => answerLast(),
  async edit(i, text) {
    if (!(await mayAsk())) return;
    state.turns.length = i + 1;
    state.turns[i].text = text;
    answerLast();
    draft.focus();
  },
};

function show() {
  views = showTurns(log, actions, running !== null);
  document.body.classList.toggle("comparing", state.compare || state.turns.some((turn) => turn.answers.length > 1));
  byId("welcome").hidden = state.turns.length > 0;
  byId("send").hidden = running !== null;
  byId("send").disabled = keyIsMissing();
  byId("stop").hidden = running === null;
  if (!save()) complain(word("full"));
}

function complain(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

/** For those who hear the page. */
function tell(text) {
  byId("told").textContent = text;
}

function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

function isAtEnd() {
  return window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 80;
}

/** Whether a question can be asked now, with these settings. A server that was away may be back. */
async function mayAsk() {
  if (!server || keyIsMissing()) await meetServer();
  return server !== null && !keyIsMissing() && running === null && settingsAreRight();
}

async function send() {
  if (!draft.value.trim() || !(await mayAsk())) return;
  const text = draft.value; // that of now: the wait for the server may have been long
  if (!text.trim()) return;
  state.turns.push({ text, answers: [] });
  draft.value = state.draft = "";
  grow(draft);
  await answerLast();
}

/** Ask, of one side or of both, for the answers to the last turn. */
async function answerLast() {
  if (!(await mayAsk())) return;
  const controller = (running = new AbortController());
  const last = state.turns.length - 1;
  const sides = state.compare ? [0, 1] : [0];
  const answers = (state.turns[last].answers = sides.map((side) => newAnswer(server, side)));
  // both sides draw the same numbers, so that they differ by their adapters only
  const seed = state.compare ? Math.floor(Math.random() * 2 ** 31) : null;
  const requests = sides.map((side) => requestOf(server, side, last, answers[side], seed));
  complain("");
  tell(word("answering"));
  show();
  scrollToEnd();
  const statuses = await Promise.all(
    sides.map((side) => fill(answers[side], requests[side], controller.signal, () => changed(side))),
  );
  running = null;
  tell(controller.signal.aborted ? word("stopped") : word("answered"));
  const atEnd = isAtEnd();
  show();
  if (atEnd) scrollToEnd();
  if (statuses.includes(401)) askForKey();
  if (statuses.includes(404)) await meetServer(); // an adapter has gone
}

const drawn = new Set(); // sides that are drawn at the next frame

function changed(side) {
  if (drawn.has(side)) return;
  drawn.add(side);
  requestAnimationFrame(() => {
    drawn.delete(side);
    const atEnd = isAtEnd();
    views[side]?.update();
    if (atEnd) scrollToEnd();
  });
}

async function meetServer() {
  let found;
  try {
    found = await describeServer();
  } catch (error) {
    if (error.status === 401) askForKey();
    else complain(error.message);
    return;
  }
  byId("key-form").hidden = true;
  byId("send").disabled = false;
  complain("");
  if (JSON.stringify(found) === JSON.stringify(server)) return; // what is being typed stays
  server = found;
  byId("composer").classList.toggle("alone", server.adapters.length === 0);
  if (!server.adapters.length) state.compare = false;
  byId("model").textContent = document.title = server.model;
  showSettings(server);
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("send").disabled = true;
  complain(aboutKey());
  byId("key").focus();
}

function keyIsMissing() {
  return !byId("key-form").hidden;
}

/** What is wrong with the key that was given, while another one is asked for. */
function aboutKey() {
  return keyIsMissing() && readKey() ? word("wrong_key") : "";
}

function toggleSettings(open) {
  settings.hidden = !open;
  byId("show-settings").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("with-settings", open);
  // on a phone they take the conversation's place
  if (open && getComputedStyle(document.querySelector("main")).display === "none") window.scrollTo(0, 0);
}

function closeSettings() {
  toggleSettings(false);
  byId("show-settings").focus();
}

/** Whether all numbers can be asked for. The browser says in words what is wrong with the first that can't. */
function settingsAreRight() {
  const wrong = wrongNumber();
  if (!wrong) return true;
  if (settings.contains(wrong)) toggleSettings(true);
  wrong.reportValidity();
  return false;
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  onEnter(draft, send);
  draft.addEventListener("input", () => {
    state.draft = draft.value;
    grow(draft);
    save();
  });
  byId("stop").addEventListener("click", () => {
    running?.abort();
    draft.focus();
  });
  byId("new").addEventListener("click", () => {
    running?.abort();
    state.turns = [];
    complain("");
    tell("");
    show();
    draft.focus();
  });
  byId("language").addEventListener("click", () => {
    state.language = state.language === "zh" ? "en" : "zh";
    speak();
  });
  byId("show-settings").addEventListener("click", () => toggleSettings(settings.hidden));
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    keepKey(byId("key").value.trim());
    byId("key").value = "";
    complain("");
    await meetServer();
    if (!keyIsMissing()) draft.focus();
  });
  byId("close-settings").addEventListener("click", closeSettings);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (running) running.abort();
    else if (!settings.hidden) closeSettings();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible" && !running) meetServer(); // adapters come and go
  });
  window.addEventListener("pagehide", save);
}

function speak() {
  useLanguage(state.language);
  byId("language").lang = state.language === "zh" ? "en" : "zh";
  byId("language").textContent = word("language");
  complain(aboutKey());
  show();
  if (server) showSettings(server);
}

restore();
listen();
listenToSettings(() => server, () => {
  if (server) showSettings(server);
  show();
});
speak();
draft.value = state.draft;
grow(draft);
scrollToEnd();
await meetServer();
document.body.classList.add("ready");
