// The panel of conversations: those that are kept, a search, and their files.

import { asJson, asMarkdown, drop, isKept, keep, keepFile, keeps } from "./kept.js";
import { kept, newId, setKeeps, titleOf } from "./kept.js";
import { state } from "./store.js";
import { byId, make } from "./text.js";
import { word } from "./words.js";

/** Keep the conversation of now, if the reader wants that. False where the browser has no more room. */
export function keepNow() {
  if (!state.turns.length || !(keeps() || isKept(state.id))) return true;
  state.id ||= newId();
  const done = keep(state);
  showChats();
  return done;
}

let actions = {};

/** Show the list, if it can be seen. */
export function showChats() {
  if (byId("chats").hidden) return;
  byId("keep").checked = keeps();
  const query = byId("search").value.trim();
  const found = kept(query);
  byId("chat-list").replaceChildren(...found.map(chatView));
  byId("no-chats").hidden = found.length > 0;
  byId("no-chats").textContent = word(query ? "nothing_found" : "no_chats");
  for (const id of ["export-markdown", "export-json"]) byId(id).disabled = !state.turns.length;
  for (const id of ["export-all", "drop-all"]) byId(id).disabled = !found.length;
}

function chatView(conversation) {
  const { id, changed } = conversation;
  const title = titleOf(conversation);
  const form = { dateStyle: "medium", timeStyle: "short" };
  const date = new Date(changed).toLocaleString(document.documentElement.lang, form);
  const open = make("button", { type: "button", className: "chat" });
  open.append(make("span", { textContent: title }), make("small", { textContent: date }));
  if (id === state.id) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => actions.open(conversation));
  const remove = make("button", { type: "button", className: "quiet", textContent: "×" });
  remove.ariaLabel = word("remove", { name: title });
  remove.addEventListener("click", () => dropAll([conversation]));
  return make("li", {}, open, remove);
}

function dropAll(conversations) {
  const title = titleOf(conversations[0]);
  const count = conversations.length;
  if (!confirm(count > 1 ? word("drop_many", { count }) : word("drop_one", { title }))) return;
  for (const { id } of conversations) drop(id);
  if (conversations.some(({ id }) => id === state.id)) {
    state.turns = []; // or it would be kept again
    actions.open({});
  }
  showChats();
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

function fileName(ending) {
  const words = titleOf(state).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  return `${words || "chat"}.${ending}`;
}

/** Set up what never changes. `given` are open(conversation) and complain(text). */
export function listenToChats(given) {
  actions = given;
  byId("keep").addEventListener("change", (event) => {
    setKeeps(event.target.checked);
    if (!keepNow()) actions.complain(word("no_room"));
    showChats();
  });
  byId("search").addEventListener("input", showChats);
  byId("export-markdown").addEventListener("click", () => {
    download(fileName("md"), "text/markdown", asMarkdown(state));
  });
  byId("export-json").addEventListener("click", () => {
    download(fileName("json"), "application/json", asJson([state]));
  });
  byId("export-all").addEventListener("click", () => {
    download("conversations.json", "application/json", asJson(kept(byId("search").value.trim())));
  });
  byId("drop-all").addEventListener("click", () => dropAll(kept(byId("search").value.trim())));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async ({ target }) => {
    try {
      const conversations = keepFile(await target.files[0].text());
      if (conversations.length) actions.open(conversations[0]);
    } catch (error) {
      actions.complain(error.message);
    }
    target.value = "";
    showChats();
  });
}
