// The controls: an adapter and its scale for each side, system prompt, tools, thinking, sampling, colours.

import { NUMBERS, toolsProblem } from "./answers.js";
import { listenToColours } from "./colours.js";
import { save, state } from "./store.js";
import { byId, make } from "./text.js";
import { word } from "./words.js";

/** Show the controls for what this server has, with what was chosen. */
export function showSettings(server) {
  state.sides.forEach((side, i) => showSide(server, side, i));
  byId("compare").checked = state.compare;
  byId("side-1").hidden = !state.compare;
  byId("system").value = state.system;
  byId("tools").value = state.tools;
  checkTools();
  const mode = byId("mode");
  mode.replaceChildren(
    make("option", { value: "", textContent: `${word("mode_default")} (${server.template})` }),
    ...server.modes.map((name) => make("option", { value: name, textContent: name })),
  );
  mode.value = server.modes.includes(state.mode) ? state.mode : "";
  mode.disabled = !server.modes.length;
  byId("numbers").replaceChildren(...NUMBERS.map((number) => numberRow(server, number)));
  byId("about").textContent = word("about", server);
}

function showSide(server, side, i) {
  const label = word(i ? "second_adapter" : "adapter");
  const names = server.adapters.map((adapter) => adapter.name);
  // whoever serves one adapter wants to hear it
  side.adapter ??= i === 0 && names.length === 1 ? names[0] : "";
  if (!names.includes(side.adapter)) side.adapter = "";
  const adapter = make("select", { id: `adapter-${i}`, ariaLabel: label });
  adapter.append(make("option", { value: "", textContent: word("base") }));
  adapter.append(...names.map((name) => make("option", { value: name, textContent: name })));
  adapter.value = side.adapter;
  const scale = make("input", {
    id: `scale-${i}`,
    type: "number",
    step: 0.01,
    min: -100,
    max: 100,
    value: side.scale,
    placeholder: server.default_scale,
    ariaLabel: `${label}: ${word("scale")}`,
  });
  const named = make("label", { className: "scale", hidden: !side.adapter }, word("scale"), scale);
  adapter.addEventListener("change", () => {
    side.adapter = adapter.value;
    named.hidden = !side.adapter;
    save();
  });
  scale.addEventListener("input", () => {
    side.scale = scale.value;
    save();
  });
  byId(`side-${i}`).replaceChildren(adapter, named);
}

function numberRow(server, { name, ...range }) {
  const input = make("input", { id: name, type: "number", value: state.numbers[name] ?? "", ...range });
  input.placeholder = defaultOf(server, name);
  if (name === "max_tokens") input.max = server.limits.answer_tokens;
  input.addEventListener("input", () => {
    state.numbers[name] = input.value;
    save();
  });
  const label = make("label", { htmlFor: name, textContent: word(name) });
  return make("div", { className: "number" }, label, input);
}

function defaultOf(server, name) {
  if (name === "seed") return word("any_seed");
  if (name === "max_tokens") return server.max_tokens;
  return (server.sampling_of_mode[state.mode] ?? server.sampling)[name];
}

function checkTools() {
  const [tools, problem] = [byId("tools"), byId("tools-problem")];
  const text = toolsProblem(tools.value);
  tools.setCustomValidity(text);
  tools.setAttribute("aria-invalid", String(Boolean(text)));
  problem.textContent = text;
  problem.hidden = !text;
}

/** The first input whose value the server would refuse, of those that count now. */
export function wrongSetting() {
  const scales = ".side:not([hidden]) .scale:not([hidden]) input";
  const inputs = document.querySelectorAll(`#tools, #numbers input, ${scales}`);
  return [...inputs].find((input) => !input.validity.valid);
}

/** Set up what never changes. `server()` is what was last heard of the server. */
export function listenToSettings(server, changed) {
  byId("compare").addEventListener("change", (event) => {
    state.compare = event.target.checked;
    // the base beside an adapter is what one most often wants to see
    const [first, second] = state.sides;
    const other = server()?.adapters[0];
    if (state.compare && other && first.adapter === second.adapter) {
      second.adapter = first.adapter ? "" : other.name;
    }
    changed();
  });
  byId("system").addEventListener("input", (event) => {
    state.system = event.target.value;
    save();
  });
  byId("tools").addEventListener("input", (event) => {
    state.tools = event.target.value;
    checkTools();
    save();
  });
  listenToColours();
  byId("mode").addEventListener("change", (event) => {
    state.mode = event.target.value;
    changed();
  });
  byId("reset").addEventListener("click", () => {
    Object.assign(state, { numbers: {}, mode: "", system: "", tools: "" });
    changed();
  });
}
