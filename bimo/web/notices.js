// What the page says about itself: a toast with an undo, a bar at the top for lasting trouble, one question dialog, the
// sentence for each kind of error, and the voice a screen reader hears.

import { connect, server } from "./chat.js";
import { icon } from "./icons.js";
import { t } from "./i18n.js";
import { storageProblem } from "./library.js";
import { apiKey, setApiKey } from "./preferences.js";
import { html, IconButton, signal, useEffect, useRef, useState } from "./ui.js";

// ---- the voice ---------------------------------------------------------------------------------------------------

const spoken = signal("");

/** Let a screen reader say `text` when it has finished what it is saying. */
export function announce(text) {
  spoken.value = spoken.peek() === text ? `${text}\u00a0` : text; // the same sentence twice must differ to be said twice
}

/** The live region. The thread itself is silent (aria-live off): read token by token, an answer would be noise. */
export function Announcer() {
  return html`<div class="offscreen" role="status" aria-live="polite">${spoken.value}</div>`;
}

const NARRATE_EVERY = 3000; // ms; whole sentences, a few at a time

/** Reads a growing answer aloud in whole sentences: `hear(text)` as it grows, `end(text)` once. */
export class Narrator {
  #position = 0;
  #last = performance.now();

  hear(text) {
    if (performance.now() - this.#last < NARRATE_EVERY) return;
    const fresh = text.slice(this.#position);
    const end = Math.max(...[". ", "! ", "? ", "。", "！", "？", "\n"].map((sign) => fresh.lastIndexOf(sign)));
    if (end >= 0) this.#say(fresh.slice(0, end + 1));
  }

  end(text) {
    this.#say(text.slice(this.#position));
  }

  #say(part) {
    this.#position += part.length;
    this.#last = performance.now();
    const plain = part.replace(/```\w*|[*_`#>|]/g, " ").replace(/\s+/g, " ").trim();
    if (plain) announce(plain);
  }
}

// ---- toast -------------------------------------------------------------------------------------------------------

const TOAST_TIME = 8000; // ms; longer while the pointer or the focus is on it (WCAG 2.2.1)
const toast = signal(null);

/** Show `text` for a moment, with an optional { label, run } action. */
export function notify(text, action) {
  toast.value = { text, action };
}

export function Toast() {
  const shown = toast.value;
  const [held, hold] = useState(false);
  useEffect(() => {
    if (!shown || held) return undefined;
    const timer = setTimeout(() => (toast.value = null), TOAST_TIME);
    return () => clearTimeout(timer);
  }, [shown, held]);
  const act = () => {
    toast.value = null;
    shown.action.run();
  };
  return html`<div class="toast-place" role="status">
    ${shown && html`<div class="toast" onPointerEnter=${() => hold(true)} onPointerLeave=${() => hold(false)}
        onFocusIn=${() => hold(true)} onFocusOut=${() => hold(false)}>
      <span>${shown.text}</span>
      ${shown.action && html`<button type="button" class="toast-action" onClick=${act}>${shown.action.label}</button>`}
      <${IconButton} name="close" label=${t("close")} onClick=${() => (toast.value = null)} />
    </div>`}
  </div>`;
}

// ---- a question before something that cannot be undone -----------------------------------------------------------

const question = signal(null);

/** Ask; resolves to true when the user agrees. */
export function confirm({ title, text, action }) {
  return new Promise((resolve) => (question.value = { title, text, action, resolve }));
}

export function Question() {
  const dialog = useRef(null);
  const asked = question.value;
  useEffect(() => {
    if (asked) dialog.current.showModal();
  }, [asked]);
  if (!asked) return null;
  const close = (agreed) => {
    dialog.current.close();
    question.value = null;
    asked.resolve(agreed);
  };
  return html`<dialog ref=${dialog} class="question" role="alertdialog" aria-labelledby="question-title"
      aria-describedby="question-text" onCancel=${(event) => { event.preventDefault(); close(false); }}>
    <h2 id="question-title">${asked.title}</h2>
    <p id="question-text">${asked.text}</p>
    <div class="row-end">
      <button type="button" class="button" autofocus onClick=${() => close(false)}>${t("cancel")}</button>
      <button type="button" class="button danger" onClick=${() => close(true)}>${asked.action}</button>
    </div>
  </dialog>`;
}

// ---- errors ------------------------------------------------------------------------------------------------------

/** One friendly sentence for an ApiError (or its stored form). */
export function errorSentence(error) {
  const { kind, retryAfter, promptTokens, contextLength, status } = error;
  if (kind === "busy") return retryAfter ? t("error.busy", { count: retryAfter }) : t("error.busy.soon");
  if (kind === "context") {
    return promptTokens ? t("error.context", { prompt: promptTokens, context: contextLength }) : t("error.context.plain");
  }
  if (kind === "server" || kind === "request") return t(`error.${kind}`, { status: String(status || "") });
  return t(`error.${kind}`);
}

/** The server's own words are shown under the sentence where they help to mend the request. */
export function errorDetail({ kind, detail }) {
  return ["request", "server", "model"].includes(kind) ? detail : "";
}

/** Asks for the server's API key; `onSaved` runs once it is kept. */
export function KeyForm({ onSaved, id }) {
  const [key, setKey] = useState("");
  const [remember, setRemember] = useState(false);
  const save = (event) => {
    event.preventDefault();
    if (!key.trim()) return;
    setApiKey(key, remember);
    setKey("");
    connect();
    onSaved?.();
  };
  return html`<form class="key-form" onSubmit=${save}>
    <label class="offscreen" for=${id}>${t("key.label")}</label>
    <input id=${id} class="input" type="password" autocomplete="off" spellcheck=${false} placeholder=${t("key.placeholder")}
      value=${key} onInput=${(event) => setKey(event.target.value)} />
    <button type="submit" class="button primary" disabled=${!key.trim()}>${t("key.save")}</button>
    <label class="check"><input type="checkbox" checked=${remember} onChange=${(event) => setRemember(event.target.checked)} />
      ${t("key.remember")}</label>
  </form>`;
}

/** The bar at the top: the server cannot be reached, is loading, wants a key; or nothing will be kept. */
export function Banner() {
  const [dismissed, dismiss] = useState("");
  const { state } = server.value;
  if (state === "key") {
    return html`<div class="banner" role="alert">${icon("alert")}
      <div class="grow"><p>${t(apiKey.value ? "banner.key.wrong" : "banner.key")}</p><${KeyForm} id="banner-key" /></div></div>`;
  }
  if (state === "down" || state === "loading") {
    return html`<div class="banner" role="alert">${icon("alert")}<p class="grow">${t(`banner.${state}`)}</p>
      <button type="button" class="button small" onClick=${connect}>${t("retry")}</button></div>`;
  }
  const problem = storageProblem.value;
  if (!problem || problem === dismissed) return null;
  return html`<div class="banner" role="alert">${icon("alert")}<p class="grow">${t(`banner.storage.${problem}`)}</p>
    <${IconButton} name="close" label=${t("close")} onClick=${() => dismiss(problem)} /></div>`;
}
