// One message of the thread: the user's words in a bubble, the model's on the page itself; below them the few things that
// can be done with them, and, for an answer, what it cost and how it ended.

import { continueInNewChat, currentRun, regenerate, resend, send } from "./chat.js";
import { editing, fillComposer } from "./composer.js";
import { splitReasoning, versions } from "./conversation.js";
import { icon } from "./icons.js";
import { number, t } from "./i18n.js";
import { chooseVersion, current } from "./library.js";
import { announce, errorDetail, errorSentence, KeyForm, Narrator } from "./notices.js";
import { Prose } from "./prose.js";
import { copyText, html, IconButton, isComposing, isPlainEnter, languageOf, memo, useEffect, useRef, useState } from "./ui.js";

function CopyButton({ text }) {
  const [state, setState] = useState("");
  const copy = async () => {
    const done = (await copyText(text)) ? "done" : "failed";
    setState(done);
    announce(t(`copy.${done}`));
    setTimeout(() => setState(""), 1600);
  };
  return html`<${IconButton} name=${state === "done" ? "check" : "copy"} label=${state ? t(`copy.${state}`) : t("message.copy")}
    onClick=${copy} />`;
}

/** "‹ 2/3 ›" for a message that has other versions. */
function Versions({ node }) {
  const ids = versions(current.value, node.id);
  if (ids.length < 2) return null;
  const position = ids.indexOf(node.id);
  const go = (step) => () => {
    if (!ids[position + step]) return;
    chooseVersion(ids[position + step]);
    announce(t("versions.position", { position: position + step + 1, total: ids.length }));
  };
  return html`<span class="versions" role="group" aria-label=${t("versions.label")}>
    <${IconButton} name="previous" label=${t("versions.previous")} aria-disabled=${position === 0} onClick=${go(-1)} />
    <span aria-label=${t("versions.position", { position: position + 1, total: ids.length })}>${position + 1}/${ids.length}</span>
    <${IconButton} name="next" label=${t("versions.next")} aria-disabled=${position === ids.length - 1} onClick=${go(1)} />
  </span>`;
}

function Editor({ node }) {
  const [text, setText] = useState(node.content);
  const area = useRef(null);
  useEffect(() => {
    area.current.style.height = "auto";
    area.current.style.height = `${area.current.scrollHeight + 2}px`;
  }, [text]);
  useEffect(() => {
    const element = area.current;
    element.focus();
    element.setSelectionRange(element.value.length, element.value.length);
    element.parentElement.scrollIntoView({ block: "nearest" });
  }, []);
  const close = () => {
    editing.value = "";
    fillComposer();
  };
  const submit = () => {
    if (resend(node.id, text)) close();
  };
  const onKeyDown = (event) => {
    if (isPlainEnter(event)) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape" && !isComposing(event)) {
      event.stopPropagation();
      close();
    }
  };
  return html`<div class="editor">
    <textarea ref=${area} class="input" dir="auto" aria-label=${t("edit.label")} value=${text}
      onInput=${(event) => setText(event.target.value)} onKeyDown=${onKeyDown}></textarea>
    <div class="row-end">
      <button type="button" class="button" onClick=${close}>${t("cancel")}</button>
      <button type="button" class="button primary" disabled=${!text.trim()} onClick=${submit}>${t("edit.send")}</button>
    </div>
  </div>`;
}

const FOLD = 1600; // characters of a question that are shown at first; pasted documents are longer

function Bubble({ text }) {
  const [open, setOpen] = useState(false);
  const long = text.length > FOLD + 400;
  const shown = long && !open ? `${text.slice(0, FOLD).replace(/[\ud800-\udbff]$/, "")}…` : text;
  return html`<div class="bubble" dir="auto" lang=${languageOf(text)}>${shown}</div>
    ${long && html`<button type="button" class="link-button" aria-expanded=${open} onClick=${() => setOpen(!open)}>
      ${t(open ? "message.less" : "message.more")}</button>`}`;
}

const Question = memo(({ node }) => {
  const locked = Boolean(currentRun.value);
  return html`<article class="message user" data-id=${node.id}>
    <h2 class="offscreen">${t("message.you")}</h2>
    ${editing.value === node.id
      ? html`<${Editor} node=${node} />`
      : html`<${Bubble} key=${node.id} text=${node.content} />
        <div class="actions">
          <${Versions} node=${node} />
          <${IconButton} name="edit" label=${t("message.edit")} disabled=${locked} onClick=${() => (editing.value = node.id)} />
          <${CopyButton} text=${node.content} />
        </div>`}
  </article>`;
});

/** The button that asks for it vanishes while the answer is written: the composer takes the focus. */
function answerAgain(id) {
  regenerate(id);
  fillComposer();
}

/** "128 tokens · 45.2 tokens/s · first word after 0.4 s" */
function Stats({ node }) {
  const { usage, timing, model } = node;
  const parts = [];
  if (usage?.completion !== undefined) {
    parts.push(t("stats.tokens", { count: usage.completion }));
    const rate = (usage.completion - 1) / (timing?.stream / 1000); // the first token belongs to the wait
    if (timing?.stream > 50 && rate > 0) {
      parts.push(t("stats.rate", { rate: number(rate, rate < 100 ? 1 : 0) }));
    }
  } else if (usage?.pieces) parts.push(t("stats.about", { count: usage.pieces }));
  if (node.finish === "stopped") parts.unshift(t("finish.stopped"));
  if (timing?.wait) parts.push(t("stats.wait", { seconds: number(timing.wait / 1000, 2) }));
  if (!parts.length) return null;
  const more = [model];
  if (usage?.prompt !== undefined) more.push(t("stats.prompt", { count: usage.prompt }));
  if (usage?.cached) more.push(t("stats.cached", { count: usage.cached }));
  return html`<span class="stats" title=${more.filter(Boolean).join(" · ")}>${parts.join(" · ")}</span>`;
}

/** How the answer ended, when it did not end by itself. */
function Ending({ node, last }) {
  const finish = node.finish ?? "interrupted"; // no ending was stored: the page was closed meanwhile
  const error = node.error;
  const retry = () => answerAgain(node.id);
  if (error && !(error.kind === "interrupted")) {
    const detail = errorDetail(error);
    return html`<div class="notice trouble" role="alert">${icon("alert")}
      <div class="grow">
        <p>${errorSentence(error)}</p>
        ${detail && html`<p class="detail">${detail}</p>`}
        ${last && (error.kind === "key"
          ? html`<${KeyForm} id="key-${node.id}" onSaved=${retry} />`
          : html`<div class="row">
              ${error.kind === "context" && html`<button type="button" class="button primary small"
                onClick=${() => fillComposer(continueInNewChat(node.id))}>${t("error.context.new")}</button>`}
              <button type="button" class="button small" onClick=${retry}>${t("retry")}</button>
            </div>`)}
      </div></div>`;
  }
  if (["stop", "stopped", "tool_calls"].includes(finish)) return null;
  const interrupted = finish === "interrupted";
  return html`<div class="notice ${interrupted ? "trouble" : ""}" role=${interrupted ? "alert" : "note"}>
    ${icon("alert")}
    <div class="grow"><p>${t(interrupted && !node.content ? "finish.interrupted.empty" : `finish.${finish}`)}</p></div>
    ${last && interrupted && html`<button type="button" class="button small" onClick=${retry}>${t("retry")}</button>`}
    ${last && finish === "length" && html`<button type="button" class="button small"
      onClick=${() => send(t("finish.length.prompt")) && fillComposer()}>${t("finish.length.continue")}</button>`}
  </div>`;
}

function Reasoning({ text, thinking }) {
  if (!text && !thinking) return null;
  return html`<details class="reasoning">
    <summary>${icon("thinking")} ${t(thinking ? "reasoning.now" : "reasoning.done")}</summary>
    <div class="reasoning-text" dir="auto">${text}</div>
  </details>`;
}

/** Says a growing answer aloud, in sentences, until it is taken off the page. */
function Voice({ run, content }) {
  const narrator = useRef(null);
  useEffect(() => {
    narrator.current = new Narrator();
    announce(t("answer.begins"));
    return () => narrator.current.end(splitReasoning(run.text.peek()).content);
  }, []);
  useEffect(() => narrator.current.hear(content), [content]);
  return null;
}

/** What there is to show of an answer. While it is being written that is in its run, and reading `run.text` here has
 * this one message drawn again with each piece. */
function shownText(node, run) {
  if (!run) return { content: node.content, reasoning: node.reasoning, thinking: false };
  const split = splitReasoning(run.text.value);
  const thinking = split.thinking || Boolean(run.reasoning && !split.content);
  return { content: split.content, reasoning: run.reasoning || split.reasoning, thinking };
}

function AnswerActions({ node, last, locked }) {
  const offersRetry = last && (node.error || (node.finish ?? "interrupted") === "interrupted"); // the notice has the button
  return html`<div class="actions">
    <${Versions} node=${node} />
    ${node.content && html`<${CopyButton} text=${node.content} />`}
    ${!offersRetry && html`<${IconButton} name="regenerate" label=${t("message.regenerate")} disabled=${locked}
      onClick=${() => answerAgain(node.id)} />`}
    <${Stats} node=${node} />
  </div>`;
}

const Answer = memo(({ node, last }) => {
  const running = currentRun.value;
  const run = running?.nodeId === node.id ? running : null;
  const { content, reasoning, thinking } = shownText(node, run);
  // One Prose for both states: when the answer ends, its finished blocks stay as they are.
  return html`<article class="message assistant" data-id=${node.id} aria-busy=${Boolean(run)}>
    <h2 class="offscreen">${t("message.answer")}</h2>
    ${run && html`<${Voice} key="voice" run=${run} content=${content} />`}
    <${Reasoning} key="reasoning" text=${reasoning} thinking=${thinking} />
    ${content && html`<${Prose} key="prose" text=${content} streaming=${Boolean(run)}
      onPaint=${run && ((cost) => (run.paintCost = cost))} />`}
    ${run && !content && html`<div key="waiting" class="waiting" aria-hidden="true"><i></i><i></i><i></i></div>`}
    ${!run && html`<div key="ending">
      ${!content && node.finish === "stop" && html`<p class="quiet">${t("answer.empty")}</p>`}
      <${Ending} node=${node} last=${last} />
      <${AnswerActions} node=${node} last=${last} locked=${Boolean(running)} />
    </div>`}
  </article>`;
});

/** A message; `last` when nothing follows it. */
export function Message({ node, last }) {
  return node.role === "user" ? html`<${Question} node=${node} />` : html`<${Answer} node=${node} last=${last} />`;
}
