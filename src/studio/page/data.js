// The second step: rows, and how the model will see them.

import { ServerError, ask } from "./api.js";
import { attempt, bytesText, choices, complain, get, showProgress, work } from "./jobs.js";
import { asked, save, state } from "./state.js";
import { byId, make } from "./text.js";
import { set } from "./plan.js";
import { said, word } from "./words.js";

const step = byId("data");
const FEW = 4; // findings that are shown at once
const PAIRS = "a row with a chosen and a rejected answer is for --loss dpo";
let limits = { upload_bytes: Infinity };
let seen = ""; // what the shown preview is about
let controller = null;

export async function showFiles(server, changed) {
  limits = server?.limits ?? limits;
  const found = (await attempt(step, () => get("studio/data"))) ?? [];
  const files = found.map(({ bytes, ...file }) => ({ ...file, note: bytesText(bytes) }));
  choices(byId("files"), files, state.data, (path) => look(path, changed));
  if (state.data && seen !== about()) await look(state.data, changed);
  if (!state.data) for (const id of ["preview", "other-rows"]) byId(id).hidden = true;
}

export const nameOf = (path) => path.split("/").pop();
const about = () => JSON.stringify([state.language, asked()]); // loss and columns decide what rows are

/** Show the preview of a file. It is chosen even if it is wrong, so that its name stands by its mistakes. */
async function look(path, changed) {
  controller?.abort(new DOMException("", "AbortError"));
  const mine = (controller = new AbortController());
  Object.assign(state, { data: path, rows: 0, ready: false });
  seen = about();
  changed();
  for (const id of ["preview", "other-rows"]) byId(id).hidden = true;
  if (state.paired && state.paired !== path) {
    if (state.settings.loss === "dpo") set("loss", "");
    state.paired = "";
  }
  byId("pairs").hidden = !state.paired;
  const result = await attempt(step, () => {
    showProgress(step, word("looking"));
    return work("preview", { settings: asked() }, null, mine.signal);
  });
  if (mine !== controller) return;
  if (!result && !state.settings.loss && step.querySelector(".problem").textContent.includes(PAIRS)) {
    set("loss", "dpo");
    state.paired = path;
    return look(path, changed);
  }
  if (result) showPreview(result);
  else seen = ""; // what is wrong is told again
  byId("other-rows").hidden = Boolean(result);
  changed();
}

function showPreview(result) {
  Object.assign(state, { rows: result.rows, ready: result.trained > 0 });
  save();
  byId("preview").hidden = false;
  byId("counts").textContent = word("counts", {
    rows: result.rows.toLocaleString(),
    tokens: result.tokens.toLocaleString(),
    trained: result.trained.toLocaleString(),
  });
  const findings = result.findings.map(({ name, count, first, meaning }) => {
    const place = word("finding", { count: count.toLocaleString(), first: placeOf(first) });
    return make("li", {}, make("b", { textContent: place }), ` ${said(`finding ${name}`, meaning ?? name)}`);
  });
  const all = findings.length ? findings : [make("li", {}, word("no_findings"))];
  byId("findings").replaceChildren(...all.slice(0, FEW));
  byId("more-findings").querySelector("ul").replaceChildren(...all.slice(FEW));
  showSkipped(result.findings.find(({ name }) => name === "bad row")?.count ?? 0);
  byId("samples").replaceChildren(...(result.samples ?? []).map(sample));
  byId("rejected").hidden = !byId("samples").querySelector("del");
}

/** Offer to leave out rows that cannot be used, or say that they are. */
function showSkipped(bad) {
  const isSkipped = state.settings.on_bad_row === "skip";
  byId("skip-rows").hidden = !bad || isSkipped;
  byId("skip-rows").textContent = word("skip_rows", { count: bad.toLocaleString() });
  byId("skip-rows").onclick = () => {
    set("on_bad_row", "skip");
    seen = about(); // the preview is the same
    showSkipped(bad);
  };
  byId("skipped").hidden = !bad || !isSkipped;
}

/** "folder/rows.jsonl, line 3" without its folders, in the reader's language. */
const placeOf = (first) =>
  first
    .replace(/[^\s:]*\//, "")
    .replace(/\b(line|row) (\d+)/, (_, kind, at) => word(`place_${kind}`, { at }));

function sample(parts) {
  const shown = parts.map(([text, weight]) => {
    const textContent = text.replace(/[\0␀]/g, "∎");
    if (weight < 0) return make("del", { textContent });
    return weight ? make("mark", { textContent }) : textContent;
  });
  return make("li", {}, make("pre", {}, ...shown));
}

async function upload(name, blob, changed, server) {
  const file = await attempt(step, async () => {
    if (blob.size > limits.upload_bytes) {
      throw new ServerError(word("large_file", { name, most: bytesText(limits.upload_bytes) }));
    }
    showProgress(step, word("uploading", { name }));
    const reply = await ask(`studio/data?name=${encodeURIComponent(name)}`, { method: "POST", body: blob });
    return reply.json();
  });
  if (!file) return;
  Object.assign(state, { data: file.path, rows: 0, ready: false });
  await showFiles(server, changed);
}

export function listenToData(server, changed) {
  const drop = step.querySelector(".drop");
  const take = async ([file, ...others]) => {
    if (others.length) complain(step, word("one_file"));
    else if (file) await upload(file.name, file, changed, server());
  };
  byId("data-file").addEventListener("change", async ({ target }) => {
    await take([...target.files]);
    target.value = "";
  });
  for (const [event, over] of Object.entries({ dragover: true, dragleave: false, drop: false })) {
    // beside the box a file would replace the page
    window.addEventListener(event, (happened) => {
      if (!happened.dataTransfer?.types.includes("Files")) return;
      happened.preventDefault();
      drop.classList.toggle("over", over);
      if (event === "drop" && state.step === "data") take([...happened.dataTransfer.files]);
    });
  }
  byId("use-rows").addEventListener("click", async () => {
    const text = byId("rows").value.trim();
    const name = /^[[{]/.test(text) ? "pasted.jsonl" : "pasted.txt";
    if (text) await upload(name, new Blob([text, "\n"]), changed, server());
  });
}
