// The chat page: what happens when.

import { describeServer } from "./api.js";
import { askedSides, callBefore, fill, newAnswer, requestOf } from "./answers.js";
import { keepNow, listenToChats, showChats } from "./chats.js";
import { draftChips, readFile } from "./files.js";
import { closePanel, listenToPanels, showConversation, togglePanel } from "./panels.js";
import { useRenderer } from "./rendering.js";
import { keepingEnd, scrollToEnd } from "./scrolling.js";
import { listenToSettings, showSettings, wrongSetting } from "./settings.js";
import { keepKey, readKey, restore, save, state } from "./store.js";
import { byId } from "./text.js";
import { grow, onEnter, showTurns } from "./turns.js";
import { useLanguage, word } from "./words.js";

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
    answerIfTold();
    draft.focus();
  },
};

function show() {
  views = showTurns(log, actions, running !== null);
  const compared = state.turns.some((turn) => turn.answers.length > 1);
  document.body.classList.toggle("comparing", state.compare || compared);
  byId("welcome").hidden = state.turns.length > 0;
  byId("send").hidden = running !== null;
  byId("send").disabled = keyIsMissing();
  byId("stop").hidden = running === null;
  showDraft();
  if (!running && !keepNow()) complain(word("no_room"));
  if (!save()) complain(word("full"));
}

/** Show what is asked for, a message or the result of a call, and the files beside it. */
function showDraft() {
  const call = callBefore(state.turns.length);
  draft.placeholder = call ? word("result_of", call) : word("ask");
  draft.ariaLabel = call ? word("result_of", call) : word("message");
  const remove = (file) => {
    state.files = state.files.filter((other) => other !== file);
    showDraft();
    save();
    byId("attach").focus();
  };
  keepingEnd(() => byId("chips").replaceChildren(...draftChips(state.files, remove)));
}

async function attach(files) {
  complain("");
  for (const file of files) {
    try {
      state.files.push(await readFile(file));
    } catch (error) {
      complain(error.message);
    }
  }
  showDraft();
  if (!save()) complain(word("full"));
  draft.focus();
}

function complain(text) {
  keepingEnd(() => {
    problem.textContent = text;
    problem.hidden = !text;
  });
}

/** For those who hear the page. */
function tell(text) {
  byId("told").textContent = text;
}

/** Whether a question can be asked now, with these settings. A server that was away may be back. */
async function mayAsk() {
  if (!server || keyIsMissing()) await meetServer();
  return server !== null && !keyIsMissing() && running === null && settingsAreRight();
}

async function send() {
  const isEmpty = () => !draft.value.trim() && !state.files.length;
  if (isEmpty() || !(await mayAsk())) return;
  if (isEmpty()) return; // by now: the wait for the server may have been long
  state.turns.push({ text: draft.value, files: state.files, answers: [] });
  draft.value = state.draft = "";
  state.files = [];
  grow(draft);
  await answerIfTold();
}

/** Ask for an answer, unless a call of a tool still waits for its result. */
async function answerIfTold() {
  if (callBefore(state.turns.length)) show();
  else await answerLast();
}

/** Ask, of one side or of both, for the answers to the last turn. */
async function answerLast() {
  if (!(await mayAsk())) return;
  const controller = (running = new AbortController());
  const last = state.turns.length - 1;
  const sides = askedSides();
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
  const failure = answers.find(({ error }) => error)?.error;
  tell(controller.signal.aborted ? word("stopped") : (failure ?? word("answered")));
  keepingEnd(show);
  if (statuses.includes(401)) askForKey();
  if (statuses.includes(404)) await meetServer(); // an adapter has gone
}

const drawn = new Set(); // sides that are drawn at the next frame

function changed(side) {
  if (drawn.has(side)) return;
  drawn.add(side);
  requestAnimationFrame(() => {
    drawn.delete(side);
    keepingEnd(() => views[side]?.update());
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
  useRenderer(server.renders);
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

/** Begin a conversation, or go on with one that was kept. */
function open({ id = "", turns = [], system = state.system, tools = state.tools }) {
  keepNow();
  running?.abort();
  Object.assign(state, { id, turns, system, tools });
  complain("");
  tell("");
  if (server) showSettings(server);
  show();
  showChats();
  showConversation();
  scrollToEnd();
  draft.focus();
}

/** Whether all settings can be asked for. The browser says what is wrong with the first that can't. */
function settingsAreRight() {
  const wrong = wrongSetting();
  if (!wrong) return true;
  if (settings.contains(wrong)) togglePanel("settings", true);
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
  byId("new").addEventListener("click", () => open({}));
  byId("attach").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async ({ target }) => {
    await attach([...target.files]);
    target.value = "";
  });
  byId("language").addEventListener("click", () => {
    state.language = state.language === "zh" ? "en" : "zh";
    speak();
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    keepKey(byId("key").value.trim());
    byId("key").value = "";
    complain("");
    await meetServer();
    if (!keyIsMissing()) draft.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (running) running.abort();
    else closePanel();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible" && !running) meetServer(); // adapters come and go
  });
  window.addEventListener("pagehide", () => {
    keepNow();
    save();
  });
}

function speak() {
  useLanguage(state.language);
  byId("language").lang = state.language === "zh" ? "en" : "zh";
  byId("language").textContent = word("language");
  complain(aboutKey());
  tell(""); // it was in the other language
  show();
  showChats();
  if (server) showSettings(server);
}

restore();
listen();
listenToPanels(showChats);
listenToChats({ open, complain });
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
