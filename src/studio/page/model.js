// The first step: the base model.

import { attempt, bytesText, choices, complain, follow, get, post, showProgress, work } from "./jobs.js";
import { save, state } from "./state.js";
import { byId } from "./text.js";
import { word } from "./words.js";

const step = byId("model");
let found = [];
let controller = new AbortController();

export async function showModels(server, changed) {
  const named = await attempt(step, () => get("studio/models"));
  found = named ?? found;
  if (!state.model && found.length === 1) state.model = found[0].path;
  const listed = found.some(({ path }) => path === state.model);
  const others = state.model && !listed ? [{ path: state.model, note: "" }] : [];
  const shown = [...found, ...others].map((model) => ({
    ...model,
    note: [model.bytes && bytesText(model.bytes), model.about].filter(Boolean).join(", "),
  }));
  choices(byId("models"), shown, state.model, (path) => take(path, changed));
  byId("no-models").hidden = shown.length > 0;
  byId("no-models").textContent = word("no_models", server ?? { folder: "…" });
  changed();
}

function take(path, changed) {
  complain(step);
  state.model = path;
  save();
  changed();
}

const progress = ({ progress: now }) => showProgress(step, now?.text ?? word("fetching"), now ?? {});

/** Fetch a model of the hub, or find again one that is being fetched. */
async function fetchModel(server, changed, body) {
  controller = new AbortController();
  const { signal } = controller;
  const button = byId("model-form").querySelector("button");
  await attempt(step, async () => {
    showProgress(step, word("fetching"));
    const result = await (body ? work("fetch", body, progress, signal) : follow("fetch", progress, signal));
    state.model = result.name; // a run is given the name, and finds the file again
    byId("model-path").value = "";
  }, button);
  if (!step.querySelector(".problem").textContent) await showModels(server(), changed);
}

export function listenToModel(server, changed) {
  byId("model-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const path = byId("model-path").value.trim();
    if (!path) return;
    if (path.startsWith("hf://")) {
      await fetchModel(server, changed, { name: path });
      return;
    }
    await attempt(step, async () => {
      const { problem } = await post("studio/command", { settings: { load_model: path }, run: "run" });
      if (problem) throw new Error(problem);
      state.model = path;
      byId("model-path").value = "";
    });
    if (state.model === path) await showModels(server(), changed);
  });
  step.querySelector(".progress button").addEventListener("click", () => controller.abort());
  if (state.jobs.fetch) fetchModel(server, changed);
}
