// The conversation as it is seen. Whoever makes it says what edit and retry do.

import { callBefore } from "./answers.js";
import { fileViews } from "./files.js";
import { markdownView } from "./rendering.js";
import { state } from "./store.js";
import { copyButton, make, plainNodes, showNodes } from "./text.js";
import { word } from "./words.js";

const shown = new WeakMap(); // what was made for a turn, and of what

/** Show all turns in `log`. Returns the views of the last turn's answers, which may still grow.
 *
 * What is there and has not changed stays: who listens to the page does not hear it again. */
export function showTurns(log, actions, busy) {
  const made = state.turns.map((turn, i) => turnView(turn, i, actions));
  made.forEach(({ section }, i) => {
    const old = log.children[i];
    if (!old) log.append(section);
    else if (old !== section) old.replaceWith(section);
  });
  while (log.children.length > made.length) log.lastChild.remove();
  for (const button of log.querySelectorAll(".asks")) button.disabled = busy;
  return made.at(-1)?.views ?? [];
}

function turnView(turn, i, actions) {
  const { text, answers } = turn;
  const old = shown.get(turn);
  if (old && old.text === text && old.answers === answers && old.language === state.language) return old;
  const views = answers.map((answer) => answerView(answer, actions.retry));
  const side = make("div", { className: "answers" }, ...views.map((view) => view.element));
  const section = make("section", { className: "turn" }, questionView(turn, i, actions), side);
  const made = { text, answers, language: state.language, section, views };
  shown.set(turn, made);
  return made;
}

function questionView(turn, i, actions) {
  const call = callBefore(i);
  const text = make("p", { className: "said", textContent: turn.text, hidden: !turn.text });
  const edit = make("button", { type: "button", className: "quiet asks", textContent: word("edit") });
  const who = make("h2", { className: "unseen", textContent: word("you") });
  const view = make("div", { className: "question" }, who);
  if (call) view.append(make("p", { className: "result", textContent: word("result_of", call) }));
  view.append(...fileViews(turn.files), text, make("div", { className: "foot" }, edit));
  edit.addEventListener("click", () => {
    const form = editForm(turn.text, (changed) => actions.edit(i, changed), () => {
      form.replaceWith(view);
      edit.focus();
    });
    view.replaceWith(form);
    const area = form.querySelector("textarea");
    grow(area);
    area.focus();
  });
  return view;
}

function editForm(text, saved, cancelled) {
  const area = make("textarea", { value: text, ariaLabel: word("message") });
  const save = make("button", { className: "main asks", textContent: word("save") });
  const cancel = make("button", { type: "button", textContent: word("cancel") });
  const form = make("form", { className: "edit" }, area, make("div", { className: "row" }, save, cancel));
  area.addEventListener("input", () => grow(area));
  onEnter(area, () => form.requestSubmit());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) saved(area.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    event.stopPropagation();
    cancelled();
  });
  cancel.addEventListener("click", cancelled);
  return form;
}

function answerView(answer, retry) {
  const label = make("h2", { className: "label", textContent: answer.label });
  const summary = make("summary");
  const thoughts = make("div", { className: "text" });
  const fold = make("details", { className: "thoughts" }, summary, thoughts);
  const body = make("div", { className: "text" });
  const calls = make("div", { className: "calls" });
  const showThoughts = markdownView(thoughts);
  const showBody = markdownView(body);
  const note = make("p", { className: "note" });
  const again = make("button", { type: "button", className: "quiet asks again", textContent: word("retry") });
  again.addEventListener("click", retry);
  const figures = make("span", { className: "figures" });
  const foot = make("div", { className: "foot" }, copyButton(() => answer.content), again, figures);
  const element = make("article", { className: "answer" }, label, fold, body, calls, note, foot);
  fold.addEventListener("toggle", update);

  function update() {
    element.setAttribute("aria-busy", String(answer.running));
    element.classList.toggle("running", answer.running);
    fold.hidden = !answer.thoughts.trim();
    summary.textContent = word(answer.running && !answer.content ? "thinking" : "thoughts");
    if (fold.open) showThoughts(answer.thoughts, answer.running);
    showBody(answer.content, answer.running);
    if (calls.children.length < answer.calls.length) calls.replaceChildren(...answer.calls.map(callView));
    note.textContent = noteOf(answer);
    note.classList.toggle("error", Boolean(answer.error));
    note.hidden = !note.textContent;
    foot.hidden = answer.running;
    figures.textContent = figuresOf(answer);
  }
  update();
  return { element, update };
}

function callView(call) {
  const code = make("div");
  showNodes(code, plainNodes(`~~~~json\n${call.arguments}`));
  return make("section", { className: "call" }, make("h3", { textContent: word("calls", call) }), code);
}

function noteOf(answer) {
  if (answer.error) return answer.error;
  if (answer.running) return "";
  if (answer.finish === "stopped") return word("stopped");
  if (answer.finish === "length") return word("cut");
  return answer.content.trim() || answer.calls.length ? "" : word("empty");
}

/** The speed of fewer than 20 tokens would be chance. */
function figuresOf({ tokens, speed, first }) {
  const parts = [];
  if (tokens) parts.push(word("tokens", { count: tokens }));
  if (speed && tokens >= 20) {
    parts.push(word("speed", { speed: speed < 10 ? speed.toFixed(1) : Math.round(speed) }));
  }
  if (first) parts.push(word("first", { seconds: first.toFixed(2) }));
  return parts.join(" · ");
}

/** As high as its text, as far as the style sheet allows. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Enter does `act`, except within an input method, where it ends a word. */
export function onEnter(area, act) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    act();
  });
}
