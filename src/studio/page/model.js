// The first step: the base model.

import { attempt, bytesText, choices, complain, follow, get, post, showProgress, work } from "./jobs.js";
import { save, state } from "./state.js";
import { byId } from "./text.js";
import { word } from "./words.js";

const step = byId("model");
const isMerged = ({ path }) => path.endsWith("/merged.pth");
let found = [];
let controller = new AbortController();

/** List the models. One is chosen: the `last` that was used, or the only one. */
export async function showModels(server, changed, last = "") {
  const named = await attempt(step, () => get("studio/models"));
  found = named ?? found;
  const isFound = (model) => found.some(({ path }) => path === model);
  const bases = found.filter((model) => !isMerged(model));
  state.model ||= isFound(last) ? last : bases.length === 1 ? bases[0].path : "";
  const others = state.model && !isFound(state.model) ? [{ path: state.model, note: "" }] : [];
  const shown = [...bases, ...found.filter(isMerged), ...others].map(({ bytes, about, ...one }) => ({
    ...one,
    note: [bytes && bytesText(bytes), about, isMerged(one) && word("file_merged")].filter(Boolean).join(", "),
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
    const named = await attempt(step, () => post("studio/models", { name: path }));
    if (!named) return;
    state.model = named.path;
    byId("model-path").value = "";
    await showModels(server(), changed);
  });
  step.querySelector(".progress button").addEventListener("click", () => controller.abort());
  if (state.jobs.fetch) fetchModel(server, changed);
}
