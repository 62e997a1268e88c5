// What was chosen so far. It lives as long as the tab does; the run also stands in the address.

const STATE = "rwkv-miss-studio";

export const state = {
  language: navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en",
  step: "model", // the one that is open
  model: "",
  data: "",
  rows: 0, // of the data, once they were looked at
  ready: false, // whether a run can have the data
  paired: "", // the data whose pairs have set the loss
  settings: {}, // what was typed: name -> text
  name: "", // of the run to be started
  offered: "", // its name if nobody types one
  run: "", // the one that is shown
  beside: [], // runs whose curves are laid over it
  jobs: {}, // kind -> id, of those that a reload must find again
};

export function restore() {
  try {
    Object.assign(state, JSON.parse(sessionStorage.getItem(STATE) ?? "{}"));
  } catch {
    sessionStorage.removeItem(STATE);
  }
  readAddress(location.href);
}

export function readAddress(url) {
  const run = new URLSearchParams(new URL(url).hash.slice(1)).get("run") ?? "";
  if (run && run !== state.run) Object.assign(state, { run, step: "run" });
}

export function save() {
  sessionStorage.setItem(STATE, JSON.stringify(state));
  const hash = state.run ? `#run=${encodeURIComponent(state.run)}` : "";
  if (hash !== location.hash) history.replaceState(null, "", `${location.pathname}${hash}`);
}

/** The settings of the run that is being prepared. */
export const asked = () => ({ ...state.settings, load_model: state.model, data_file: state.data });
