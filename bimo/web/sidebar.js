// The conversations: new, find, open, rename, delete with undo. Beside the chat on a wide window, a drawer over it on a
// narrow one (while the drawer is open the chat is inert, so neither Tab nor a screen reader wanders behind it).

import { runs, stop } from "./chat.js";
import { fillComposer } from "./composer.js";
import { language, languageTag, t } from "./i18n.js";
import { icon } from "./icons.js";
import { current, erase, rename, restore, show, summaries } from "./library.js";
import { notify } from "./notices.js";
import { dark, languageChoice, narrow, sidebarOpen, theme } from "./preferences.js";
import { openSettings } from "./settings-panel.js";
import { searchMessages } from "./storage.js";
import { html, IconButton, isComposing, isPlainEnter, signal, useEffect, useRef, useState } from "./ui.js";

/** Whether the drawer is open; it has no meaning on a wide window. */
export const drawerOpen = signal(false);
const searchRequest = signal(0);
let opener = null; // what had the focus when the drawer opened

const PAGE = 200; // list entries drawn at once

/** Whether the sidebar can be seen now. */
export const sidebarShown = () => (narrow.value ? drawerOpen.value : sidebarOpen.value);

export function toggleSidebar(open) {
  opener = document.activeElement; // before the chat becomes inert, which takes the focus from it
  if (narrow.peek()) drawerOpen.value = open ?? !drawerOpen.peek();
  else sidebarOpen.value = open ?? !sidebarOpen.peek();
}

/** Open the sidebar with the cursor in its search field. */
export function startSearch() {
  toggleSidebar(true);
  searchRequest.value += 1;
}

/** Begin a new chat. */
export async function newChat() {
  await show("");
  drawerOpen.value = false;
  fillComposer();
}

const switchLanguage = () => (languageChoice.value = language.peek() === "zh" ? "en" : "zh");
const switchTheme = () => (theme.value = dark.peek() ? "light" : "dark");

/** Which heading a conversation stands under: "today", "yesterday", "week", or its month as text. */
function ageGroup(time) {
  const start = new Date();
  start.setHours(0, 0, 0, 0);
  const days = Math.ceil((start - time) / 86_400_000);
  if (days <= 0) return t("sidebar.today");
  if (days === 1) return t("sidebar.yesterday");
  if (days <= 7) return t("sidebar.week");
  return new Intl.DateTimeFormat(languageTag.value, { year: "numeric", month: "long" }).format(time);
}

async function remove(line, index) {
  await stop(line.id); // its last words are then in what an undo brings back
  const erased = await erase(line.id);
  if (erased) notify(t("sidebar.deleted", { title: line.title }), { label: t("undo"), run: () => restore(erased) });
  // The button that had the focus is gone with its line: the next line's takes it.
  const buttons = document.querySelectorAll(".conversation .delete");
  (buttons[Math.min(index, buttons.length - 1)] ?? document.querySelector(".new-chat"))?.focus();
}

function TitleEditor({ line, close }) {
  const input = useRef(null);
  const done = useRef(false);
  useEffect(() => input.current.select(), []);
  const finish = (save) => {
    if (done.current) return; // leaving by Enter also blurs
    done.current = true;
    if (save) rename(line.id, input.current.value);
    close();
  };
  const onKeyDown = (event) => {
    if (isPlainEnter(event)) finish(true);
    else if (event.key === "Escape" && !isComposing(event)) {
      event.stopPropagation();
      finish(false);
    }
  };
  return html`<input ref=${input} class="input title-input" dir="auto" maxlength="200" aria-label=${t("sidebar.rename.label")}
    defaultValue=${line.title} onKeyDown=${onKeyDown} onBlur=${() => finish(true)} />`;
}

function Line({ line, index }) {
  const [renaming, setRenaming] = useState(false);
  const renameButton = useRef(null);
  const isCurrent = current.value.id === line.id;
  const running = runs.value.has(line.id);
  const close = () => {
    setRenaming(false);
    setTimeout(() => renameButton.current?.focus());
  };
  if (renaming) return html`<li class="conversation"><${TitleEditor} line=${line} close=${close} /></li>`;
  return html`<li class="conversation ${isCurrent ? "current" : ""}">
    <a href="#/c/${line.id}" dir="auto" title=${line.title} aria-current=${isCurrent ? "page" : undefined}
      onClick=${() => (drawerOpen.value = false)}>
      ${running && html`<span class="pulse" role="img" aria-label=${t("sidebar.running")}></span>`}
      <span class="conversation-title">${line.title}</span>
    </a>
    <span class="conversation-actions">
      <button ref=${renameButton} type="button" class="icon-button rename" title=${t("sidebar.rename")}
        aria-label=${t("sidebar.rename.of", { title: line.title })} onClick=${() => setRenaming(true)}>${icon("edit")}</button>
      <button type="button" class="icon-button delete" title=${t("sidebar.delete")}
        aria-label=${t("sidebar.delete.of", { title: line.title })} onClick=${() => remove(line, index)}>${icon("trash")}</button>
    </span>
  </li>`;
}

/** Lines whose title, or one of whose messages, has `words`; titles answer at once, messages a moment later. */
function useSearch(words) {
  const [inMessages, setInMessages] = useState(new Set());
  useEffect(() => {
    setInMessages(new Set());
    if (!words) return undefined;
    const controller = new AbortController();
    const timer = setTimeout(async () => {
      const found = await searchMessages(words, controller.signal);
      if (!controller.signal.aborted) setInMessages(found);
    }, 150);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [words]);
  if (!words) return summaries.value;
  return summaries.value.filter(({ id, title }) => title.toLowerCase().includes(words.toLowerCase()) || inMessages.has(id));
}

function List({ lines, words }) {
  const [limit, setLimit] = useState(PAGE);
  if (!lines.length) return html`<p class="quiet pad">${t(words ? "sidebar.nothing" : "sidebar.empty")}</p>`;
  const groups = [];
  lines.slice(0, limit).forEach((line, index) => {
    const name = ageGroup(line.updated);
    if (groups.at(-1)?.name !== name) groups.push({ name, lines: [] });
    groups.at(-1).lines.push({ line, index });
  });
  return html`${groups.map((group) => html`<section key=${group.name}>
      <h3>${group.name}</h3>
      <ul>${group.lines.map(({ line, index }) => html`<${Line} key=${line.id} line=${line} index=${index} />`)}</ul>
    </section>`)}
    ${lines.length > limit && html`<button type="button" class="button small more" onClick=${() => setLimit(limit + PAGE)}>
      ${t("sidebar.more")}</button>`}`;
}

export function Sidebar() {
  const [words, setWords] = useState("");
  const search = useRef(null);
  const lines = useSearch(words.trim());
  const shown = sidebarShown();

  useEffect(() => {
    if (searchRequest.value) search.current.select();
  }, [searchRequest.value]);
  useEffect(() => {
    // A dialog's manners for the drawer: the focus goes in with it and comes back when it closes.
    if (!narrow.value || !drawerOpen.value) return undefined;
    const back = opener;
    const inside = document.querySelector(".sidebar").contains(document.activeElement);
    if (!inside) document.querySelector(".close-drawer").focus();
    return () => back?.isConnected && back.focus();
  }, [narrow.value, drawerOpen.value]);

  const onSearchKey = (event) => {
    if (event.key !== "Escape" || isComposing(event) || !words) return;
    event.stopPropagation();
    setWords("");
  };

  return html`<aside class="sidebar ${shown ? "shown" : ""}" aria-label=${t("sidebar.label")} inert=${!shown}>
    <div class="sidebar-top">
      <a class="brand" href="#/" onClick=${newChat}>
        <img src="/static/favicon.svg" alt="" width="26" height="26" /><span>bimo</span><span lang="zh-CN" class="brand-zh">笔墨</span>
      </a>
      ${narrow.value && html`<${IconButton} name="close" class="close-drawer" label=${t("sidebar.close")} onClick=${() => toggleSidebar(false)} />`}
    </div>
    <button type="button" class="new-chat" onClick=${newChat}>${icon("compose")}<span>${t("sidebar.new")}</span></button>
    <div class="search" role="search">
      ${icon("search")}
      <input ref=${search} type="search" class="input" aria-label=${t("sidebar.search")} placeholder=${t("sidebar.search")}
        title=${t("sidebar.search.keys")} value=${words} onInput=${(event) => setWords(event.target.value)} onKeyDown=${onSearchKey} />
    </div>
    <nav class="conversations" aria-label=${t("sidebar.list")}><${List} lines=${lines} words=${words.trim()} /></nav>
    <div class="sidebar-bottom">
      <button type="button" class="side-button" onClick=${openSettings}>${icon("settings")}<span>${t("settings.title")}</span></button>
      <button type="button" class="side-button" lang=${language.value === "zh" ? "en" : "zh-CN"} onClick=${switchLanguage}>
        ${language.value === "zh" ? "English" : "中文"}</button>
      <${IconButton} name=${dark.value ? "sun" : "moon"} label=${t(dark.value ? "theme.to.light" : "theme.to.dark")} onClick=${switchTheme} />
    </div>
  </aside>
  ${narrow.value && drawerOpen.value && html`<div class="scrim" onClick=${() => toggleSidebar(false)}></div>`}`;
}
