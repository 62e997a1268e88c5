// Asking for answers: the request of a side, and what comes of it.

import { streamAnswer } from "./api.js";
import { contentOf } from "./files.js";
import { BLANK, state } from "./store.js";
import { word } from "./words.js";

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
  const label = adapter ? adapter + (times === 1 ? "" : ` × ${times}`) : server.model;
  return { ...BLANK, calls: [], adapter, scale: given, label, running: true };
}

/** The request for `answer`, which is the answer of `side` to turns[last]. */
export function requestOf(server, side, last, answer, seed) {
  const { messages, calls } = seen(side, last);
  messages.push(messageOf(state.turns[last], calls[0]));
  const request = { model: server.model, messages };
  if (state.tools.trim()) request.tools = JSON.parse(state.tools);
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

/** The conversation before turns[end] as one side saw it, and the calls that wait for their results then.
 *
 * Where only the first side answered, both go on from that. */
function seen(side, end) {
  const messages = [];
  let calls = [];
  if (state.system.trim()) messages.push({ role: "system", content: state.system });
  for (const turn of state.turns.slice(0, end)) {
    const answer = turn.answers[side] ?? turn.answers[0];
    if (answer && failed(answer)) continue; // as if it was never asked
    messages.push(messageOf(turn, calls[0]));
    calls = calls.slice(1);
    if (!answer) continue; // the result of one call of several
    messages.push(answerMessage(answer));
    calls = answer.calls;
  }
  return { messages, calls };
}

function failed({ content, thoughts, calls, error, finish }) {
  return !content && !thoughts && !calls.length && Boolean(error || finish === "stopped");
}

function messageOf(turn, call) {
  const content = contentOf(turn);
  return call ? { role: "tool", tool_call_id: call.id, content } : { role: "user", content };
}

function answerMessage({ content, thoughts, calls }) {
  const message = { role: "assistant", content };
  if (thoughts) message.reasoning_content = thoughts;
  if (calls.length) {
    message.tool_calls = calls.map(({ id, ...called }) => ({ id, type: "function", function: called }));
  }
  return message;
}

export const askedSides = () => (state.compare ? [0, 1] : [0]);

/** The call whose result turns[i] is, or null. In a comparison it is one of either side. */
export function callBefore(i) {
  return askedSides().map((side) => seen(side, i).calls[0]).find(Boolean) ?? null;
}

/** What is wrong with this text of tools: "" if nothing is. The server knows more about schemas. */
export function toolsProblem(text) {
  if (!text.trim()) return "";
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    return error.message;
  }
  const isTool = (tool) => typeof (tool?.function ?? tool)?.name === "string";
  return Array.isArray(tools) && tools.every(isTool) ? "" : word("wrong_tools");
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
      const { content = "", reasoning_content: thoughts = "", tool_calls: calls = [] } = choice.delta;
      if ((content || thoughts || calls.length) && !firstAt) {
        firstAt = performance.now();
        answer.first = (firstAt - began) / 1000;
      }
      answer.content += content;
      answer.thoughts += thoughts;
      answer.calls.push(...calls.map((call) => ({ id: call.id, ...call.function }))); // they come whole
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
