// What the user prefers about the page itself: theme, language, sidebar, and the server's key. Small values in
// localStorage, read once; every access is guarded because a browser may forbid storage or have filled it.

import { computed, effect, signal } from "./ui.js";

const PREFERENCES = "bimo.preferences"; // also read by boot.js
const KEY = "bimo.key";

/** Parsed JSON under `name`, or `fallback` when it is missing, unreadable or storage is forbidden. */
export function readStored(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Store `value` as JSON; false when the browser will not keep it. */
export function writeStored(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const stored = readStored(PREFERENCES, {});
const oneOf = (value, allowed, fallback) => (allowed.includes(value) ? value : fallback);

export const THEMES = ["system", "light", "dark"];
export const LANGUAGE_CHOICES = ["auto", "zh", "en"];

export const theme = signal(oneOf(stored?.theme, THEMES, "system"));
export const languageChoice = signal(oneOf(stored?.language, LANGUAGE_CHOICES, "auto"));
export const sidebarOpen = signal(stored?.sidebar !== false); // on wide screens; on narrow ones it is a drawer

const root = document.documentElement;

effect(() => {
  if (theme.value === "system") delete root.dataset.theme;
  else root.dataset.theme = theme.value;
});

effect(() => {
  writeStored(PREFERENCES, { theme: theme.value, language: languageChoice.value, sidebar: sidebarOpen.value });
});

const systemDark = signal(false);
const darkQuery = matchMedia("(prefers-color-scheme: dark)");
systemDark.value = darkQuery.matches;
darkQuery.addEventListener("change", (event) => (systemDark.value = event.matches));

/** Whether the page is shown dark right now. */
export const dark = computed(() => theme.value === "dark" || (theme.value === "system" && systemDark.value));

/** True when the window is too narrow for the sidebar beside the chat. The width is style.css's. */
export const narrow = signal(false);
const narrowQuery = matchMedia("(max-width: 820px)");
narrow.value = narrowQuery.matches;
narrowQuery.addEventListener("change", (event) => (narrow.value = event.matches));

function readKey() {
  for (const name of ["sessionStorage", "localStorage"]) {
    try {
      const value = window[name].getItem(KEY);
      if (value) return value;
    } catch {
      // forbidden: the key then lives as long as this page
    }
  }
  return "";
}

/** The server's API key; "" when none is known. */
export const apiKey = signal(readKey());

/** Keep `key` for this tab, or, with `remember`, on this device; "" forgets it everywhere. */
export function setApiKey(key, remember) {
  apiKey.value = key.trim();
  for (const [name, keep] of [["sessionStorage", !remember], ["localStorage", remember]]) {
    try {
      if (keep && apiKey.value) window[name].setItem(KEY, apiKey.value);
      else window[name].removeItem(KEY);
    } catch {
      // forbidden: see readKey
    }
  }
}
