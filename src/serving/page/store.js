// The conversation and the settings. They live as long as the tab does, and survive a reload.

const STATE = "rwkv-miss";
const KEY = "rwkv-miss-key";

/** A conversation is a list of turns: {text, answers: [one, or one of each side]}. */
export const state = {
  turns: [],
  draft: "",
  language: navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en",
  compare: false,
  sides: [
    { adapter: null, scale: "" }, // null: not chosen yet; "" is the base
    { adapter: null, scale: "" },
  ],
  system: "",
  mode: "",
  numbers: {}, // what was typed for temperature and the like; an empty one is the server's default
};

export function restore() {
  try {
    Object.assign(state, JSON.parse(sessionStorage.getItem(STATE) ?? "{}"));
  } catch {
    sessionStorage.removeItem(STATE);
  }
  for (const answer of state.turns.flatMap((turn) => turn.answers)) {
    if (answer.running) Object.assign(answer, { running: false, finish: "stopped" });
  }
}

/** False where the browser has no more room. */
export function save() {
  try {
    sessionStorage.setItem(STATE, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

export const readKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
