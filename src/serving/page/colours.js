// The scheme that a reader chooses: light, dark, or the system's.

import { byId } from "./text.js";

const THEME = "rwkv-miss-theme"; // theme.js reads it

export function listenToColours() {
  byId("theme").value = document.documentElement.dataset.theme;
  byId("theme").addEventListener("change", ({ target: { value } }) => {
    document.documentElement.dataset.theme = value;
    if (value) localStorage.setItem(THEME, value);
    else localStorage.removeItem(THEME);
  });
}
