// Asking for answers: the request of a side, and what comes of it.

import { streamAnswer } from "./api.js";
import { state } from "./store.js";

// a step is the finest that is taken
export const NUMBERS = [
  { name: "temperature", step: 0.01, min: 0, max: 100 },
  { name: "top_p", step: 0.01, min: 0, max: 1 },
  { name: "top_k", step: 1, min: 0 },
  { name: "presence_penalty", step: 0.01, min: -100, max: 100 },
  { name: "frequency_penalty", step: 0.01, min: -100, max: 100 },
  { name: "penalty_decay", step: 0.001, min: 0, max: 1 },
  { name: "max_tokens", step: 1, min: 1 },
  { name: "seed", step: 1, min: -Number.MAX_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER },
];

/** An answer that has not begun, of this side with its settings of now. */
export function newAnswer(server, side) {
  const { adapter, scale } = state.sides[side];
  const given = adapter && scale !== "" ? Number(scale) : null;
  const times = given ?? server.default_scale;
  return {
    adapter,
    scale: given,
    label: adapter ? adapter + (times === 1 ? "" : ` × ${times}`) : server.model,
    content: "",
    thoughts: "",
    finish: "",
    error: "",
    tokens: 0,
    first: 0, // seconds until there was something to read
    speed: 0, // tokens a second after that
    running: true,
  };
}

/** The request for `answer`, which is the answer of `side` to turns[last]. */
export function requestOf(server, side, last, answer, seed) {
  const request = { model: server.model, messages: messagesOf(side, last) };
  if (answer.adapter) request.adapter_id = answer.adapter;
  if (answer.scale !== null) request.adapter_scale = answer.scale;
  if (server.modes.includes(state.mode)) request.think_mode = state.mode;
  for (const { name } of NUMBERS) {
    const typed = state.numbers[name] ?? "";
    if (typed !== "") request[name] = Number(typed);
  }
  if (seed !== null) request.seed ??= seed;
  return request;
}

/** The conversation as one side saw it. Where only the first side answered, both go on from that. */
function messagesOf(side, last) {
  const messages = [];
  if (state.system.trim()) messages.push({ role: "system", content: state.system });
  for (const { text, answers } of state.turns.slice(0, last)) {
    const { content, thoughts, finish, error } = answers[side] ?? answers[0];
    if (!content && !thoughts && (error || finish === "stopped")) continue; // as if it was never asked
    const answer = { role: "assistant", content };
    if (thoughts) answer.reasoning_content = thoughts;
    messages.push({ role: "user", content: text }, answer);
  }
  messages.push({ role: "user", content: state.turns[last].text });
  return messages;
}

/** Fill `answer` until it ends. Errors become answer.error; returns the status of one, else 0. */
export async function fill(answer, request, signal, changed) {
  const began = performance.now();
  let firstAt = 0;
  try {
    for await (const part of streamAnswer(request, signal)) {
      if (part.usage) answer.tokens = part.usage.completion_tokens;
      const choice = part.choices[0];
      if (!choice) continue;
      const { content = "", reasoning_content: thoughts = "" } = choice.delta;
      if ((content || thoughts) && !firstAt) {
        firstAt = performance.now();
        answer.first = (firstAt - began) / 1000;
      }
      answer.content += content;
      answer.thoughts += thoughts;
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.error = error.message;
    return error.status ?? 0;
  } finally {
    const seconds = (performance.now() - firstAt) / 1000;
    if (answer.tokens > 1 && firstAt && seconds > 0) answer.speed = (answer.tokens - 1) / seconds;
    answer.running = false;
    changed();
  }
  return 0;
}
