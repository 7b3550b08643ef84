// The page: wires the parts, the address (#/c/<conversation>) and the keyboard shortcuts, then draws. Start reading here.
//
//   app.js            the page                          chat.js          asking, answering, stopping; server and models
//   sidebar.js        the conversations                 api.js           the OpenAI-compatible API, errors
//   thread.js         the messages, following the end   library.js       the conversations as state
//   message.js        one message                       conversation.js  a conversation as a tree (pure data)
//   composer.js       where the user writes             storage.js       IndexedDB
//   settings-panel.js the sheet · settings.js its data  markdown.js      text -> safe DOM · prose.js while it grows
//   notices.js        toast, banner, errors, voice      highlight.js     colours for code
//   preferences.js    theme, language, key              i18n.js          words (locales/*.json) · ui.js Preact

import { connect, model, runs, server, stop } from "./chat.js";
import { Composer, fillComposer } from "./composer.js";
import { loadWords, t } from "./i18n.js";
import { current, openLibrary, show } from "./library.js";
import { Announcer, Banner, notify, Question, Toast } from "./notices.js";
import { narrow } from "./preferences.js";
import { change } from "./settings.js";
import { openSettings, SettingsPanel } from "./settings-panel.js";
import { drawerOpen, newChat, Sidebar, sidebarShown, startSearch, toggleSidebar } from "./sidebar.js";
import { Thread } from "./thread.js";
import { effect, html, IconButton, isComposing, render } from "./ui.js";

const hasMessages = (conversation) => Object.keys(conversation.nodes).length > 0;

function ModelName() {
  const { models } = server.value;
  if (!model.value) return html`<span class="model-name"></span>`;
  if (models.length === 1) return html`<span class="model-name">${model.value.id}</span>`;
  return html`<select class="model-select" aria-label=${t("settings.model")} value=${model.value.id}
    onChange=${(event) => change("model", event.target.value)}>
    ${models.map(({ id }) => html`<option key=${id} value=${id}>${id}</option>`)}
  </select>`;
}

function Header() {
  const shown = sidebarShown();
  const { title } = current.value;
  return html`<header class="top">
    <${IconButton} name=${narrow.value ? "menu" : "panel"} label=${t(shown ? "sidebar.close" : "sidebar.open")}
      aria-expanded=${shown} onClick=${() => toggleSidebar()} />
    <${ModelName} />
    ${hasMessages(current.value) && html`<h1 class="top-title" dir="auto" title=${title}>${title}</h1>`}
    <span class="grow"></span>
    ${!(shown && !narrow.value) && html`
      <${IconButton} name="compose" label=${t("sidebar.new")} onClick=${newChat} />
      <${IconButton} name="settings" label=${t("settings.title")} onClick=${openSettings} />`}
  </header>`;
}

function App() {
  const behind = narrow.value && drawerOpen.value;
  return html`
    <a class="skip" href="#composer-text" onClick=${(event) => { event.preventDefault(); document.getElementById("composer-text").focus(); }}>
      ${t("skip")}</a>
    <div class="frame">
      <${Sidebar} />
      <main class="main" inert=${behind}>
        <${Header} />
        <${Banner} />
        <${Thread} />
        <${Composer} />
      </main>
    </div>
    <${SettingsPanel} />
    <${Question} />
    <${Toast} />
    <${Announcer} />`;
}

/** Show the conversation the address names. */
async function follow() {
  const id = /^#\/c\/([\w-]+)$/.exec(location.hash)?.[1] ?? "";
  if (id && id === current.peek().id) return;
  const found = await show(id);
  if (!found) {
    await show("");
    history.replaceState(null, "", "#/");
    notify(t("conversation.missing"));
  }
  fillComposer();
}

function onKeyDown(event) {
  const command = event.ctrlKey || event.metaKey;
  const inDialog = document.querySelector("dialog[open]");
  if (inDialog || isComposing(event)) return;
  if (command && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    startSearch();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape") {
    if (narrow.peek() && drawerOpen.peek()) drawerOpen.value = false;
    else if (stop()) fillComposer(); // the stop button, which may have had the focus, is gone
  } else if (event.key === "/" && !command && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    fillComposer();
  }
}

async function start() {
  await Promise.all([loadWords(), openLibrary((id) => runs.peek().has(id))]);
  await follow();
  // The address follows the page: a new chat gets its own with its first message.
  effect(() => {
    const conversation = current.value;
    const address = hasMessages(conversation) ? `#/c/${conversation.id}` : "#/";
    if (location.hash !== address && !(address === "#/" && !location.hash)) history.replaceState(null, "", address);
    document.title = conversation.title ? `${conversation.title} · bimo` : "bimo · 笔墨";
  });
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", onKeyDown);
  render(html`<${App} />`, document.getElementById("app"));
  document.documentElement.dataset.ready = "true";
  connect();
}

start();
