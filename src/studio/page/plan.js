// The third step: what the program chose and why, what the run needs, and every setting.

import { attempt, bytesText, complain, durationText, post, showProgress, work } from "./jobs.js";
import { asked, save, state } from "./state.js";
import { byId, copyButton, make } from "./text.js";
import { said, word } from "./words.js";

const step = byId("plan");
const EARLIER = ["load_model", "data_file"]; // chosen in other steps
let fields = {}; // name -> {setting, row, input, why}
let planned = ""; // what the shown plan is about
let controller = null;
let timer = 0;
export let plan = null;

/** Make a field for every setting. What the plan chose stands above, the others below. */
export function showSettings(settings, changed) {
  fields = {};
  for (const room of document.querySelectorAll(".fields")) room.replaceChildren();
  for (const setting of settings) {
    if (!EARLIER.includes(setting.name)) fields[setting.name] = field(setting, changed);
  }
  place();
  filter();
}

function field(setting, changed) {
  const { name, help, choices } = setting;
  const id = `set-${name}`;
  const options = setting.type === "bool" ? ["false", "true"] : choices?.filter((choice) => choice !== "");
  const input = make(options?.length ? "select" : "input", { id, spellcheck: false });
  if (options?.length) {
    input.append(make("option", { value: "" }));
    for (const value of options) {
      input.append(make("option", { value, textContent: valueText(setting, value) }));
    }
  } else if (["int", "float"].includes(setting.type)) input.inputMode = "decimal";
  input.value = state.settings[name] ?? "";
  input.addEventListener(options?.length ? "change" : "input", () => {
    if (input.value === "") delete state.settings[name];
    else state.settings[name] = input.value;
    save();
    [plan, planned] = [null, ""]; // it was about something else
    changed();
    clearTimeout(timer);
    timer = setTimeout(() => showPlan(changed), options?.length ? 0 : 600);
  });
  const why = make("p", { className: "hint", id: `${id}-why` });
  const wrong = make("p", { className: "problem", id: `${id}-wrong`, hidden: true });
  const title = said(`set ${name}`, name);
  const label = make("label", { htmlFor: id }, title);
  if (title !== name) label.append(" ", make("small", { textContent: name }));
  input.setAttribute("aria-describedby", `${why.id} ${wrong.id}`);
  const row = make("div", { className: "field" }, label, input, why, wrong);
  const made = { setting, row, input, why, wrong, words: `${name} ${title} ${help}`.toLowerCase() };
  unchosen(made);
  return made;
}

function valueText(setting, value) {
  if (setting.type !== "bool") return value;
  return word(value === "true" ? "yes" : "no");
}

/** What stands in a field nobody touched: its default, with what it means and may be. */
function unchosen({ setting, input, why }, isShort = false) {
  const { low, high, below } = setting;
  const isSet = (bound) => bound !== null && bound !== undefined;
  const bounds = [
    isSet(low) && `≥ ${low}`,
    isSet(high) && high < 1e18 && `≤ ${high}`,
    isSet(below) && below < 1e18 && `< ${below}`,
  ].filter(Boolean).join(", ");
  hold(input, setting, setting.automatic ? word("automatic") : textOf(setting.default));
  const help = isShort ? setting.help.replace(/\. .*/s, ".") : setting.help;
  why.textContent = bounds ? `${help.replace(/\.$/, "")} · ${bounds}` : help;
}

function hold(input, setting, text) {
  if (input.tagName !== "SELECT") input.placeholder = text;
  else input.options[0].textContent = valueText(setting, text);
}

function textOf(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Put the fields where they belong, without moving the one that is being typed into. */
function place() {
  for (const one of Object.values(fields)) {
    const { name, common } = one.setting;
    const isChosen = plan?.chosen?.[name] !== undefined;
    const isTyped = state.settings[name] !== undefined;
    const room = byId(common || isTyped ? "common" : isChosen ? "chosen" : "others");
    if (isChosen) {
      hold(one.input, one.setting, textOf(plan.chosen[name].value));
      one.why.textContent = plan.chosen[name].why;
    } else unchosen(one, room.id === "common");
    one.row.classList.toggle("typed", isTyped);
    if (one.row.parentElement !== room && !one.row.contains(document.activeElement)) room.append(one.row);
  }
}

function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/);
  for (const { row, words: text } of Object.values(fields)) {
    row.hidden = row.parentElement?.id === "others" && !words.every((one) => text.includes(one));
  }
}

/** Plan the run as it is asked for now. The command line comes at once, the needs after a while. */
export async function showPlan(changed) {
  const body = { settings: asked(), run: state.name };
  const key = JSON.stringify(body.settings);
  controller?.abort(new DOMException("", "AbortError"));
  const mine = (controller = new AbortController());
  complain(step);
  byId("skip-bad").hidden = true;
  for (const { wrong } of Object.values(fields)) wrong.hidden = true;
  const command = await attempt(step, () => post("studio/command", body));
  if (mine !== controller) return;
  if (command) byId("command").textContent = command.command;
  const problem = command ? command.problem : step.querySelector(".problem").textContent;
  if (problem) {
    [plan, planned] = [null, ""];
    blame(problem);
  } else if (planned !== key) {
    plan = null;
    changed();
    const result = await attempt(step, () => {
      showProgress(step, word("planning"));
      return work("plan", { settings: body.settings }, null, mine.signal);
    });
    if (mine !== controller) return;
    [plan, planned] = [result ?? null, result ? key : ""];
    if (!result) blame(step.querySelector(".problem").textContent);
  }
  showNeeds();
  place();
  filter();
  changed();
}

/** Set a setting as if it was typed; "" leaves it to the program. */
export function set(name, value) {
  if (value === "") delete state.settings[name];
  else state.settings[name] = value;
  if (fields[name]) fields[name].input.value = value;
  save();
}

/** Show an error beside the field that it names, else above all; a bad row beside a button. */
function blame(problem) {
  const named = /(?:--|^)(\w+)/.exec(problem)?.[1];
  const field = fields[named];
  const hint = "; --on_bad_row skip leaves such rows out";
  complain(step, problem.replace(hint, "")); // beside the button that it holds
  byId("skip-bad").hidden = !problem.includes(hint);
  if (!field || problem.includes(hint)) return;
  field.row.closest("details").open = true;
  field.wrong.textContent = problem;
  field.wrong.hidden = false;
  field.wrong.setAttribute("role", "alert");
}

function showNeeds() {
  const needs = plan && {
    need_memory: word(plan.fits ? "fits" : "fits_not", {
      needed: bytesText(plan.memory_together),
      there: bytesText(plan.memory_there),
    }),
    need_time: plan.seconds ? word("about_time", { time: durationText(plan.seconds) }) : word("not_known"),
    need_steps: word("steps", { count: plan.steps.toLocaleString(), rows: plan.documents.toLocaleString() }),
    need_trained: word("part", {
      count: plan.trained_parameters.toLocaleString(),
      share: (100 * plan.trained_parameters / plan.base_parameters).toPrecision(2),
    }),
  };
  const rows = Object.entries(needs ?? {}).flatMap(([name, text]) => [
    make("dt", { textContent: word(name) }),
    make("dd", { textContent: text }),
  ]);
  byId("needs").replaceChildren(...rows);
  const flags = Object.entries(plan?.fix ?? {}).map(([name, value]) => `--${name} ${textOf(value)}`);
  byId("fix").hidden = !flags.length;
  if (plan && !plan.fits && !flags.length) complain(step, plan.lines.at(-1).replace(/^verdict +/, ""));
  byId("fix").textContent = word("fix", { flags: flags.join(" ") });
}

export function listenToPlan(changed) {
  byId("search").addEventListener("input", filter);
  byId("fix").addEventListener("click", () => {
    for (const [name, value] of Object.entries(plan?.fix ?? {})) set(name, textOf(value));
    showPlan(changed);
  });
  byId("skip-bad").addEventListener("click", () => {
    set("on_bad_row", "skip");
    showPlan(changed);
  });
  byId("run-name").addEventListener("keydown", ({ key, target, isComposing }) => {
    if (key === "Enter" && !isComposing) target.nextElementSibling.click();
  });
  byId("run-name").addEventListener("input", ({ target }) => {
    state.name = target.value.trim();
    save();
    clearTimeout(timer);
    timer = setTimeout(() => showPlan(changed), 600);
  });
}

/** The Copy button, in the language that was chosen. */
export function showCopy() {
  step.querySelector(".command > button")?.remove();
  step.querySelector(".command").append(copyButton(() => byId("command").textContent));
}

/** Start the run; its name, or undefined where it is refused. */
export async function start(button) {
  const body = { name: state.name, settings: asked() };
  clearTimeout(timer); // else its check wipes the reason of a refusal
  return (await attempt(step, () => post("studio/runs", body), button))?.name;
}
