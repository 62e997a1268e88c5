// What is asked of the server, and its errors in words.

import { readKey } from "./store.js";
import { word } from "./words.js";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The reply to a request. Throws ServerError with what the server said, or why it said nothing. */
export async function ask(path, options = {}) {
  const key = readKey();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const signal = options.method ? null : AbortSignal.timeout(60_000); // what is sent may take longer
  let response;
  try {
    response = await fetch(path, { signal, ...options, headers, referrerPolicy: "no-referrer" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(word("unreachable"));
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  if (status === 401) return new ServerError(word(readKey() ? "wrong_key" : "needs_key"), status);
  const seconds = response.headers.get("Retry-After");
  if (status === 429 && seconds) return new ServerError(word("busy", { seconds }), status);
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `${status} ${response.statusText}`;
  return new ServerError(word("refused", { message }), status);
}

/** What the server is: model, adapters, modes, defaults. */
export async function describeServer() {
  return (await ask("v1/server")).json();
}

/** The HTML of an answer's Markdown, or of the beginning that has come. */
export async function renderMarkdown(text, unfinished) {
  const response = await ask("page/render", { method: "POST", body: JSON.stringify({ text, unfinished }) });
  return (await response.json()).html;
}

/** The parts of an answer as they come. Throws ServerError, and AbortError where `signal` says so. */
export async function* streamAnswer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError(word("broken"));
      const events = (waiting + value).split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment: the server still lives
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const part = JSON.parse(data);
        if (part.error) throw new ServerError(word("refused", { message: part.error.message }));
        yield part;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new ServerError(word("broken")) : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
