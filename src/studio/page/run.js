// The fourth step: a run as its folder has it, and the list of runs.

import { curvesAt } from "./curves.js";
import { attempt, complain, durationText, get, pathOf, post, showProgress } from "./jobs.js";
import { save, state } from "./state.js";
import { byId, make } from "./text.js";
import { said, word } from "./words.js";

const POINTS = 400;
const TEXTS = {
  loss: (value) => value.toFixed(4),
  reward: (value) => String(Number(value.toPrecision(4))),
  bits_per_byte: (bits) => bits.toFixed(3),
  right_answers: (share) => `${Math.round(100 * share)} %`,
};
const step = byId("run");
export let run = null; // what was last heard of the run that is shown
let others = []; // the runs laid over it
let pace = null; // {time, step} when the page first saw it go
let wasState = "";
let trouble = false; // whether the run could not be asked for
const curves = curvesAt(() => {
  hear(state.run);
  showBeside();
});

/** The query for the steps that are shown. */
function query() {
  const { range } = curves;
  return `?points=${POINTS}${range ? `&from=${Math.floor(range[0])}&to=${Math.ceil(range[1])}` : ""}`;
}

export const goes = () => ["starting", "running", "stopping"].includes(run?.state);

/** Ask for the run that is shown, and show it. */
export async function heardOf(name) {
  if (!name) {
    run = null;
    return;
  }
  if (run?.name !== name) Object.assign(curves, { range: null, at: null });
  const asked = query();
  const found = await get(`${pathOf(name)}${asked}`).catch((error) => {
    if (error.status === 404 && name === state.run) run = null; // it was removed
    throw error;
  });
  if (name !== state.run || asked !== query()) return; // by now another one is shown, or another part
  if (run?.name !== name) [pace, wasState] = [null, ""];
  if (trouble) {
    complain(step);
    [trouble, wasState] = [false, ""]; // why it failed is said again
  }
  run = found;
  showRun();
}

/** The same, with an error beside the run. */
export async function hear(name) {
  try {
    await heardOf(name);
  } catch (error) {
    trouble = true;
    complain(step, error);
  }
}

/** Ask for the runs whose curves are laid over it. */
export async function showBeside() {
  const names = () => state.beside.filter((name) => name !== state.run);
  const wanted = () => names().map((name) => `${pathOf(name)}${query()}`);
  const asked = wanted();
  const found = await Promise.all(asked.map((path) => get(path).catch(() => null)));
  if (asked.join() !== wanted().join()) return; // by now others are, or another part
  others = found.filter(Boolean).map((one) => ({ ...one, name: shortName(one.name) }));
  if (run) curves.show([run, ...others]);
}

function showRun() {
  const place = run.steps && word("step_of", run);
  const text = [word(`state_${run.state}`), place, timeLeft()].filter(Boolean).join(" · ");
  const total = run.steps || 1; // a run that has ended early is done, too
  showProgress(step, text, { done: run.state === "done" ? total : run.step, total });
  if (run.state === "starting") step.querySelector("progress").removeAttribute("value");
  byId("stop-run").hidden = !run.can_stop;
  byId("resume-run").hidden = !run.can_resume;
  curves.show([run, ...others]);
  showAnswers();
  showVerdict();
  const { isCollapsed, anchorNode } = getSelection();
  if (isCollapsed || !byId("run-log").contains(anchorNode)) byId("run-log").textContent = run.log.join("\n");
  if (run.state === "failed" && wasState !== "failed") complain(step, reason());
  if (run.state !== "failed" && wasState === "failed") complain(step);
  if (wasState && wasState !== run.state) byId("told").textContent = text;
  wasState = run.state;
}

/** Why a run failed: what it said since its last start, if it could. */
function reason() {
  const log = run.log.slice(run.log.findLastIndex((line) => line.startsWith("$ ")) + 1);
  const said = log.findLast((line) => /^error:|^\S*(Error|Exception|Interrupt)\b/.test(line));
  if (said) return word("failed", { why: said.replace(/^error: /, "") });
  return word(run.has_checkpoint ? "killed" : "killed_early");
}

function timeLeft() {
  if (run.state !== "running") {
    pace = null;
    return "";
  }
  const now = { time: performance.now() / 1000, step: run.step };
  pace ??= now;
  if (now.step <= pace.step) return "";
  const seconds = (now.time - pace.time) / (now.step - pace.step);
  return word("left", { time: durationText(seconds * (run.steps - now.step)) });
}

/** The answers before the training beside the newest ones; at its end beside those that are worth using. */
function showAnswers() {
  const asked = run.evaluations.filter(({ samples }) => samples?.length);
  byId("answers").hidden = !asked.length;
  if (!asked.length) return;
  const [first, last] = [asked[0], asked.at(-1)];
  const isFirst = first === last;
  byId("now").textContent = isFirst ? "" : word("now", { step: last.step });
  const rows = first.samples.map((sample, i) => {
    const now = isFirst ? "" : (last.samples[i]?.answer ?? "");
    const cells = row([sample.prompt.replace(/\n+/g, "\n"), sample.right, sample.answer, now], last.step);
    for (const cell of cells.slice(2)) cell.classList.toggle("right", cell.textContent === sample.right);
    return make("tr", {}, ...cells);
  });
  const shares = [first, last].map((line) => line.right_answers);
  if (shares.every(Number.isFinite)) {
    const [before, now] = shares.map(TEXTS.right_answers);
    const cells = ["", word("right_answers"), before, isFirst ? "" : now];
    rows.push(make("tr", { className: "sum" }, ...row(cells, last.step)));
  }
  byId("answers").querySelector("tbody").replaceChildren(...rows);
}

/** Cells that say what they are, for a phone, where the table has no head. */
function row(texts, step) {
  const titles = [word("question"), word("right"), word("before"), word("now", { step })];
  return texts.map((textContent, i) => {
    const cell = make("td", { textContent });
    cell.dataset.column = titles[i];
    return cell;
  });
}

/** A remedy in the reader's language; "" where it has none for it. The words are the program's own. */
function remedyText(remedy) {
  const [number = ""] = /\d[\d.e+-]*$/.exec(remedy) ?? [];
  const text = said(`remedy ${remedy.slice(0, remedy.length - number.length)}`, "");
  return text ? `${text}${number}` : state.language === "zh" ? "" : remedy;
}

/** The lower rate that the verdict advises; "" where it advises none. */
export function lowerRate() {
  return /a third of the rate: --lr_init ([\d.e-]+)/.exec(run?.verdict?.remedy)?.[1] ?? "";
}

/** The verdict in the reader's language, with what was measured, and what the program would try. */
function showVerdict() {
  const { verdict } = run;
  byId("verdict").hidden = !verdict || goes();
  byId("again").hidden = !lowerRate();
  byId("again").textContent = word("again", { rate: lowerRate() });
  if (!verdict) return;
  const figures = Object.entries(TEXTS).map(([name, text]) => {
    const ends = verdict.numbers?.[name] ?? [null];
    return ends.every(Number.isFinite) ? `${word(name)} ${ends.map(text).join(" → ")}` : "";
  });
  const rule = said(`rule ${verdict.rule}`, "");
  const told = rule ? [rule, figures.filter(Boolean).join(" · ")] : [`${verdict.name}: ${verdict.reason}.`];
  if (!verdict.offered) told.push(word("not_worth"));
  else if (run.best_step) told.push(word("best", { step: run.best_step }));
  const { forgotten } = verdict;
  if (forgotten) told.push(word("forgotten", { kl: forgotten.toPrecision(3) }));
  byId("verdict").classList.toggle("poor", !verdict.offered);
  const remedies = (verdict.remedy ?? "").split(", or ").map(remedyText).filter(Boolean);
  if (remedies.length) told.push(word("remedy", { remedy: remedies.join(word("or")) }));
  byId("verdict").replaceChildren(make("b", { textContent: word("verdict") }), ` ${told.join(" ")}`);
}

/** List the runs; `choose` is called with the one that is clicked. */
export function showRuns(runs, choose) {
  byId("no-runs").hidden = runs.length > 0;
  byId("compare-hint").hidden = runs.length < 2;
  const { tagName, dataset } = document.activeElement;
  const held = dataset.run && `${tagName}[data-run="${CSS.escape(dataset.run)}"]`;
  byId("run-list").replaceChildren(...runs.map((one) => {
    const known = [word(`state_${one.state}`), one.steps ? `${one.step}/${one.steps}` : "", figure(one)];
    const button = make(
      "button",
      { type: "button", className: "chat" },
      make("span", { textContent: shortName(one.name) }),
      make("small", { textContent: known.filter(Boolean).join(" · ") }),
    );
    button.dataset.run = one.name;
    if (one.name === state.run) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => choose(one.name));
    const box = make("input", {
      type: "checkbox",
      checked: state.beside.includes(one.name),
      disabled: one.name === state.run,
      ariaLabel: word("lay_over", { name: shortName(one.name) }),
      title: word("lay_over", { name: shortName(one.name) }),
    });
    box.dataset.run = one.name;
    box.addEventListener("change", () => {
      state.beside = state.beside.filter((name) => name !== one.name);
      if (box.checked) state.beside.push(one.name);
      save();
      showBeside();
    });
    return make("li", {}, button, box);
  }));
  if (held) byId("run-list").querySelector(held)?.focus();
  const listed = Object.fromEntries(runs.map(({ name, step }) => [shortName(name), step]));
  if (others.some(({ name, step }) => (listed[name] ?? step) !== step)) showBeside(); // it goes on
}

/** A run in the folder that all of the page's are in is called by its own name. */
export const shortName = (name) => name.replace(/^runs\//, "");

/** What a run has come to: the verdict's own numbers, and before its end the newest ones. */
function figure({ verdict, loss, reward, held_out: held }) {
  const ends = Object.entries(TEXTS).map(([name, text]) => {
    const value = verdict?.numbers?.[name]?.[1];
    const title = word(name === "loss" ? "held_out" : name);
    return Number.isFinite(value) ? `${title} ${text(value)}` : "";
  });
  if (ends.some(Boolean)) return ends.filter(Boolean).join(" · ");
  if (typeof reward === "number") return `${word("reward")} ${TEXTS.reward(reward)}`;
  if (typeof held === "number") return `${word("held_out")} ${TEXTS.loss(held)}`;
  return typeof loss === "number" ? `${word("loss")} ${TEXTS.loss(loss)}` : "";
}

export function listenToRun(changed) {
  for (const [what, id] of Object.entries({ stop: "stop-run", resume: "resume-run" })) {
    byId(id).addEventListener("click", async ({ target }) => {
      await attempt(step, async () => {
        await post(`${pathOf(state.run)}/${what}`);
        await changed();
      }, target);
      if (run) showRun();
    });
  }
}
