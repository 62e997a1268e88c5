// The panels at the sides. A narrow page has room for one of them, or for none.

import { byId } from "./text.js";

const PANELS = [...document.querySelectorAll(".panel")].map((panel) => panel.id);
const NARROW = "(max-width: 75rem)";

export function togglePanel(name, open) {
  byId(name).hidden = !open;
  byId(`show-${name}`).setAttribute("aria-expanded", String(open));
  if (open && matchMedia(NARROW).matches) PANELS.filter((other) => other !== name).forEach(hide);
  document.body.classList.toggle("with-panel", PANELS.some(isOpen));
  // on a phone it takes the conversation's place
  if (open && getComputedStyle(document.querySelector("main")).display === "none") window.scrollTo(0, 0);
}

const isOpen = (name) => !byId(name).hidden;
const hide = (name) => isOpen(name) && togglePanel(name, false);

function close(name) {
  togglePanel(name, false);
  byId(`show-${name}`).focus();
}

export function closePanel() {
  const open = PANELS.findLast(isOpen);
  if (open) close(open);
}

/** Show the conversation, where a panel has taken its place. */
export function showConversation() {
  if (getComputedStyle(document.querySelector("main")).display === "none") PANELS.forEach(hide);
}

export function listenToPanels(opened) {
  for (const name of PANELS) {
    byId(`show-${name}`).addEventListener("click", () => {
      togglePanel(name, !isOpen(name));
      if (isOpen(name)) opened(name);
    });
    byId(`close-${name}`).addEventListener("click", () => close(name));
  }
}
