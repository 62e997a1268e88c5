// The conversation and the settings. They live as long as the tab does, and survive a reload.

const STATE = "rwkv-miss";
const KEY = "rwkv-miss-key";

/** A conversation is a list of turns: {text, files, answers: [one, or one of each side]}. */
export const state = {
  id: "", // of the conversation, among those that are kept
  turns: [],
  draft: "",
  files: [], // of the draft: {name, text}
  language: navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en",
  compare: false,
  sides: [
    { adapter: null, scale: "" }, // null: not chosen yet; "" is the base
    { adapter: null, scale: "" },
  ],
  system: "",
  tools: "",
  mode: "",
  numbers: {}, // what was typed for temperature and the like; an empty one is the server's default
};

/** What an answer has, before it began. */
export const BLANK = {
  adapter: null,
  scale: null,
  label: "",
  content: "",
  thoughts: "",
  calls: [], // of tools: {id, name, arguments}, which are JSON
  finish: "",
  error: "",
  tokens: 0,
  first: 0, // seconds until there was something to read
  speed: 0, // tokens a second after that
  running: false,
};

export function restore() {
  try {
    Object.assign(state, JSON.parse(sessionStorage.getItem(STATE) ?? "{}"));
    state.turns = state.turns.map(readTurn);
  } catch {
    sessionStorage.removeItem(STATE);
    state.turns = [];
  }
}

/** A turn from a file or a store. What is missing is blank; an answer that was being written has stopped. */
export function readTurn({ text, files = [], answers }) {
  const texts = [text, ...files.flatMap((file) => [file.name, file.text])];
  if (!texts.every(isText)) throw new TypeError("no turn");
  return { text, files: files.map(({ name, text }) => ({ name, text })), answers: answers.map(readAnswer) };
}

function readAnswer(given) {
  const answer = { ...BLANK };
  for (const [name, blank] of Object.entries(BLANK)) {
    if (typeof given[name] === typeof blank && given[name] !== null) answer[name] = given[name];
  }
  answer.calls = [...answer.calls].filter((call) => [call.id, call.name, call.arguments].every(isText));
  if (answer.running) Object.assign(answer, { running: false, finish: "stopped" });
  return answer;
}

const isText = (value) => typeof value === "string";

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
