// Where the user writes. Enter sends, Shift+Enter makes a line, the Enter of a Chinese input method does neither. What
// was not sent yet survives a reload (sessionStorage: this tab only).

import { currentRun, model, send, stop } from "./chat.js";
import { thread } from "./conversation.js";
import { t } from "./i18n.js";
import { current } from "./library.js";
import { effect, html, IconButton, isPlainEnter, signal, useLayoutEffect, useRef } from "./ui.js";

const DRAFT = "bimo.draft";

function storedDraft() {
  try {
    return sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    return "";
  }
}

/** Id of the question that is being edited in the thread, "" for none. */
export const editing = signal("");

const draft = signal(storedDraft());
const focusRequest = signal(0);

effect(() => {
  try {
    sessionStorage.setItem(DRAFT, draft.value);
  } catch {
    // forbidden or full: the draft then lives as long as this page
  }
});

/** Put the cursor into the composer; with `text`, after replacing what is written there. */
export function fillComposer(text) {
  if (text !== undefined) draft.value = text;
  focusRequest.value += 1;
}

export function Composer() {
  const area = useRef(null);
  const run = currentRun.value;
  const text = draft.value;

  useLayoutEffect(() => {
    const element = area.current;
    element.style.height = "auto";
    element.style.height = `${element.scrollHeight}px`; // the style sheet caps it
  }, [text]);

  useLayoutEffect(() => {
    // A tap that opens a conversation on a phone must not throw the keyboard over it.
    if (focusRequest.value && matchMedia("(hover: hover)").matches) area.current.focus();
  }, [focusRequest.value]);

  const submit = () => {
    if (send(draft.peek())) draft.value = "";
  };

  const onKeyDown = (event) => {
    if (isPlainEnter(event)) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && !text && !run) {
      const question = thread(current.peek()).findLast((node) => node.role === "user");
      if (question) {
        event.preventDefault();
        editing.value = question.id;
      }
    }
  };

  return html`<form class="composer" onSubmit=${(event) => { event.preventDefault(); submit(); }}>
    <div class="composer-box">
      <label class="offscreen" for="composer-text">${t("composer.label")}</label>
      <textarea id="composer-text" ref=${area} rows="1" dir="auto" enterkeyhint="send" aria-describedby="composer-hint"
        placeholder=${model.value ? t("composer.placeholder", { model: model.value.id }) : t("composer.label")}
        value=${text} onInput=${(event) => (draft.value = event.target.value)} onKeyDown=${onKeyDown}></textarea>
      ${run
        ? html`<${IconButton} key="stop" name="stop" class="send stop" label=${t("composer.stop")} onClick=${() => stop()} />`
        : html`<${IconButton} key="send" name="send" class="send" type="submit" label=${t("composer.send")} disabled=${!text.trim()} />`}
    </div>
    <p id="composer-hint" class="hint">${t("composer.hint")}</p>
  </form>`;
}
