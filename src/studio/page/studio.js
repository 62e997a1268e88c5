// The training page: which step is open, what is asked of the server now and then, language and key.

import { listenToColours } from "./colours.js";
import { listenToData, nameOf, showFiles } from "./data.js";
import { complain, get, pause } from "./jobs.js";
import { listenToModel, showModels } from "./model.js";
import { closePanel, listenToPanels, togglePanel } from "./panels.js";
import { listenToPlan, plan, showCopy, showPlan, showSettings, start } from "./plan.js";
import { goes, hear, heardOf, listenToRun, lowerRate, run, shortName, showBeside, showRuns } from "./run.js";
import { readAddress, restore, save, state } from "./state.js";
import { keepKey, readKey } from "./store.js";
import { byId } from "./text.js";
import { checkChat, listenToTry, showTry } from "./try.js";
import { useLanguage, word } from "./words.js";

const STEPS = ["model", "data", "plan", "run", "try"];
const SELDOM = 5; // polls between two lists of runs while none goes
let server = null;
let settings = [];
let runs = [];

const trouble = () => byId("problem").textContent;
const hasTrained = () => run?.files.some(({ name }) => /^(adapter.*|model)\.pth$/.test(name));

/** Why a step can't be done yet; "" where it can. */
const missing = {
  model: () => "",
  data: () => (state.model ? "" : word("needs_model")),
  plan: () => missing.data() || (state.data ? "" : word("needs_data")),
  run: () => (run ? "" : word("needs_start")),
  try: () => missing.run() || (goes() ? word("needs_end") : hasTrained() ? "" : word("needs_adapter")),
};

/** What a step's head says once it is done. */
const summary = {
  model: () => state.model && nameOf(state.model),
  data() {
    const name = nameOf(state.data);
    return state.rows ? word("file", { name, rows: state.rows.toLocaleString() }) : name;
  },
  plan: () => (run ?? plan)?.steps && word("planned", { steps: (run ?? plan).steps.toLocaleString() }),
  run: () => run && `${shortName(run.name)}: ${word(`state_${run.state}`)}`,
  try: () => "",
};

function show() {
  for (const name of STEPS) {
    const element = byId(name);
    const reason = missing[name]();
    const isOpen = state.step === name && !reason;
    const head = element.querySelector("h2 button");
    head.disabled = Boolean(reason);
    head.setAttribute("aria-expanded", String(isOpen));
    element.classList.toggle("open", isOpen);
    element.classList.toggle("done", !missing[STEPS[STEPS.indexOf(name) + 1] ?? name]() && name !== "try");
    element.querySelector(".note").textContent = reason || summary[name]() || "";
    element.querySelector(".body").hidden = !isOpen;
  }
  byId("model").querySelector(".main").disabled = !state.model;
  byId("data").querySelector(":scope > .body > .main").disabled = !state.ready;
  byId("plan").querySelector(".main").disabled = !plan?.fits || !state.name;
  byId("run").querySelector("[data-word=try_it]").disabled = Boolean(missing.try());
  byId("run").querySelector("[data-word=try_it]").classList.toggle("main", run?.verdict?.offered !== false);
  if (run && !missing.try()) showTry();
  save();
}

function open(name) {
  state.step = name;
  show();
  if (state.step === "model" && server) showModels(server, show, runs[0]?.model);
  if (state.step === "data" && server) showFiles(server, show).then(show);
  if (state.step === "plan") preparePlan();
  const head = byId(state.step).querySelector("h2 button");
  head.focus({ preventScroll: true });
  byId(state.step).scrollIntoView({ block: "start" });
}

function preparePlan() {
  if (!state.name || state.name === state.offered) state.name = state.offered = freeName();
  byId("run-name").value = state.name;
  const common = byId("common");
  common.parentElement.open ||= Boolean(common.querySelector(".typed")); // what was chosen is seen
  showPlan(show);
}

/** A name for the next run, after its data. */
function freeName() {
  const words = nameOf(state.data).replace(/\.\w+$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "-");
  const stem = [...words.replace(/^-+/, "")].slice(0, 76).join("") || "run"; // 80 with its number
  const isTaken = (name) => runs.some((one) => nameOf(one.name) === name);
  let name = stem;
  for (let i = 2; isTaken(name); i++) name = `${stem}-${i}`;
  return name;
}

async function choose(name) {
  state.run = name;
  await hear(name);
  if (run?.name !== name) return show(); // another one was chosen, or the server can't be reached
  adopt();
  await showBeside();
  if (getComputedStyle(document.querySelector("main")).display === "none") closePanel();
  showRuns(runs, choose);
  open("run");
}

/** The steps before show what the run has, so that the next one can begin with it. */
function adopt() {
  const { load_model: model = "", data_file: data = "", ...others } = run.settings;
  if (data !== state.data) state.rows = 0;
  const known = settings.filter(({ name }) => name in others); // without the operator's
  const typed = Object.fromEntries(known.map(({ name }) => [name, others[name]]));
  Object.assign(state, { model, data, settings: typed, name: "", ready: data !== "" });
  showSettings(settings, show);
}

async function listRuns() {
  runs = await get("studio/runs");
  showRuns(runs, choose);
}

async function askedAgain(isDue) {
  const inList = () => runs.find((one) => one.name === state.run);
  if (isDue || inList()?.state !== run?.state) await listRuns();
  const listed = inList();
  const isNew = state.run !== (run?.name ?? ""); // it could not be asked for before
  if (isNew || goes() || (listed && listed.state !== run.state)) await heardOf(state.run);
  if (isNew && run && !state.data) adopt();
  await checkChat();
}

/** Ask again and again, while somebody sees the page. */
async function poll() {
  for (let count = 1; ; count++) {
    await pause();
    if (!server) await meetServer();
    else await attended(() => askedAgain(trouble() || goes() || count % SELDOM === 0));
    show();
  }
}

/** Ask something of the server, with its errors above all steps until it answers again. */
async function attended(what) {
  let text = "";
  try {
    await what();
  } catch (error) {
    if (error.status === 401) server = null;
    byId("key-form").hidden = error.status !== 401;
    if (error.status !== 401 || readKey()) text = error.message;
  }
  if (trouble() !== text) complain(document.querySelector("main"), text);
}

async function meetServer() {
  await attended(async () => {
    [server, settings] = await Promise.all(["studio", "studio/settings"].map(get));
  });
  if (!server) return;
  byId("key-form").hidden = true;
  await attended(listRuns);
  await hear(state.run);
  if (run && !state.data) adopt();
  speak();
  await showModels(server, show, runs[0]?.model);
  await showBeside();
  if (["data", "plan"].includes(state.step)) open(state.step);
}

function speak() {
  useLanguage(state.language);
  byId("language").lang = state.language === "zh" ? "en" : "zh";
  byId("language").textContent = word("language");
  document.title = word("title");
  showCopy();
  if (!server) return;
  byId("about").textContent = word("about", { ...server, name: nameOf(server.folder) });
  byId("about").title = server.folder;
  showSettings(settings, show);
  showRuns(runs, choose);
  if (run) hear(state.run);
  show();
}

function listen() {
  for (const name of STEPS) {
    byId(name).querySelector("h2 button").addEventListener("click", () => {
      if (state.step !== name) return open(name);
      state.step = "";
      show();
    });
  }
  const mains = (name) => byId(name).querySelector(":scope > .body > .main, .start > .main");
  mains("model").addEventListener("click", () => open("data"));
  mains("data").addEventListener("click", () => open("plan"));
  mains("plan").addEventListener("click", async ({ target }) => {
    const name = await start(target.parentElement);
    if (!name) return;
    Object.assign(state, { run: name, name: "" });
    show();
    await changed();
    open("run");
  });
  byId("run").querySelector("[data-word=try_it]").addEventListener("click", () => open("try"));
  byId("again").addEventListener("click", () => {
    adopt();
    state.settings.lr_init = lowerRate();
    showSettings(settings, show);
    open("plan");
  });
  byId("new").addEventListener("click", () => {
    Object.assign(state, { run: "", name: "", settings: {}, rows: 0, data: "", ready: false });
    hear("");
    showSettings(settings, show);
    open("model");
  });
  byId("language").addEventListener("click", () => {
    state.language = state.language === "zh" ? "en" : "zh";
    speak();
    if (state.step === "plan" || state.step === "data") open(state.step);
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    keepKey(byId("key").value.trim());
    byId("key").value = "";
    await meetServer();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) closePanel();
  });
  window.addEventListener("hashchange", ({ newURL }) => {
    const before = state.run;
    readAddress(newURL); // in location.hash a save() may have put the run back by now
    if (server && state.run !== before) choose(state.run);
  });
}

const changed = async () => {
  await hear(state.run);
  await attended(listRuns);
  show();
};

restore();
useLanguage(state.language);
listen();
listenToColours();
listenToPanels(() => showRuns(runs, choose));
listenToPlan(show);
listenToRun(changed);
listenToModel(() => server, show);
listenToData(() => server, show);
listenToTry(changed);
speak();
show();
await meetServer();
const wide = matchMedia("(min-width: 75rem)");
if (wide.matches) togglePanel("runs", true);
wide.addEventListener("change", () => togglePanel("runs", wide.matches));
show();
document.body.classList.add("ready");
poll();
