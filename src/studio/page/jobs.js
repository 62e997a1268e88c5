// What the server does for this page beside training: it is asked now and then how far it is.

import { ServerError, ask } from "./api.js";
import { save, state } from "./state.js";
import { make } from "./text.js";
import { word } from "./words.js";

const PAUSE = 1000; // milliseconds

export const get = async (path) => (await ask(path)).json();
export const post = async (path, value = {}) =>
  (await ask(path, { method: "POST", body: JSON.stringify(value) })).json();
export const pathOf = (run) => `studio/runs/${run.split("/").map(encodeURIComponent).join("/")}`;

/** Wait a moment, and then until somebody can see the page. */
export async function pause(milliseconds = PAUSE) {
  await new Promise((resolve) => setTimeout(resolve, milliseconds));
  if (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

/** A job's result. Throws ServerError where it failed, and AbortError where `signal` ended it. */
export async function work(kind, body, show, signal) {
  state.jobs[kind] = (await post("studio/jobs", { kind, ...body })).id;
  save();
  return follow(kind, show, signal);
}

/** The result of a job that runs already. */
export async function follow(kind, show, signal) {
  const id = state.jobs[kind];
  const path = `studio/jobs/${id}`;
  const ended = new Promise((resolve) => signal?.addEventListener("abort", resolve));
  try {
    for (let wait = 200; ; wait = Math.min(PAUSE, 2 * wait)) {
      if (signal?.aborted) {
        await ask(path, { method: "DELETE" }).catch(() => {});
        throw signal.reason;
      }
      const job = await get(path).catch((error) => {
        if (error.status) throw error; // else the server was not there just now
      });
      if (job?.state === "done") return job.result;
      if (job?.state === "failed") throw new ServerError(job.error);
      if (job) show?.(job);
      await Promise.race([pause(wait), ended]);
    }
  } finally {
    if (state.jobs[kind] === id) delete state.jobs[kind]; // and no newer one
    save();
  }
}

/** A step's own bar: how far a job is, or that it runs. */
export function showProgress(step, text, { done, total } = {}) {
  const box = step.querySelector(".progress");
  const bar = box.querySelector("progress");
  box.hidden = text === null;
  box.querySelector("span").textContent = text ?? "";
  bar.ariaLabel = text ?? "";
  if (total) Object.assign(bar, { max: total, value: done });
  else bar.removeAttribute("value");
}

export function complain(step, error = "") {
  const place = step.querySelector(".problem");
  place.textContent = error.message ?? error;
  place.hidden = !place.textContent;
}

const attempts = new Map(); // step -> how many go on
const count = (step, more) => attempts.set(step, (attempts.get(step) ?? 0) + more).get(step);

/** Do something that may fail, with the error beside the step, and its button held meanwhile. */
export async function attempt(step, what, button) {
  const focused = document.activeElement;
  complain(step);
  count(step, 1);
  if (button) button.disabled = true;
  try {
    return await what();
  } catch (error) {
    if (error.name !== "AbortError") complain(step, error);
    return undefined;
  } finally {
    if (!count(step, -1)) showProgress(step, null);
    if (button) button.disabled = false;
    if (document.activeElement === document.body) focused.focus(); // a held button has lost it
  }
}

/** A group of things of which one is chosen. */
export function choices(group, found, chosen, choose) {
  const labels = found.map(({ path, name = path, note }) => {
    const input = make("input", { type: "radio", name: group.id, value: path, checked: path === chosen });
    input.addEventListener("change", () => choose(path));
    const texts = [make("span", { textContent: name }), make("small", { textContent: note })];
    return make("label", {}, input, ...texts);
  });
  group.replaceChildren(group.querySelector("legend"), ...labels);
  group.hidden = !found.length;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytesText(bytes) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log2(bytes || 1) / 10)));
  const value = bytes / 1024 ** power;
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${UNITS[power]}`;
}

export function durationText(seconds) {
  if (seconds < 100) return word("seconds", { count: Math.round(seconds) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return word("minutes", { count: minutes });
  return word("hours", { count: (minutes / 60).toFixed(1) });
}
