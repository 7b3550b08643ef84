// An answer's Markdown on the page, cheap while it grows: only the last block is parsed and drawn again with each piece,
// the blocks before it are finished and are not touched. When the answer ends the whole text is parsed once more, for the
// few things a later line may change in an earlier block (link definitions); blocks that come out equal keep their nodes.

import { highlight } from "./highlight.js";
import { language, t } from "./i18n.js";
import { blockToDom, blocks } from "./markdown.js";
import { announce } from "./notices.js";
import { copyText, html, languageOf, useEffect, useLayoutEffect, useRef } from "./ui.js";

const LIVE_COLOURS = 4000; // characters of a growing code block that are still coloured with each piece (a few ms)

const CLASSES = { space: "block-empty", def: "block-empty", heading: "block outline" };

function copyButton() {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy-code";
  button.textContent = t("code.copy");
  return button;
}

/** Add what the page gives a block: a bar with language and copy button above code, a frame that scrolls wide tables. */
function dress(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const tag = /language-(\S+)/.exec(code?.className ?? "")?.[1] ?? "";
    const figure = document.createElement("div");
    figure.className = "code-block";
    const bar = document.createElement("div");
    bar.className = "code-bar";
    const name = document.createElement("span");
    name.textContent = tag || t("code.plain");
    bar.append(name, copyButton());
    pre.replaceWith(figure);
    pre.tabIndex = 0; // wide code scrolls sideways: the keyboard must reach it
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", t("code.region", { language: tag || t("code.plain") }));
    figure.append(bar, pre);
  }
  for (const emphasis of fragment.querySelectorAll("em")) {
    // Slanted Chinese is hard to read; Chinese emphasises with dots.
    if (languageOf(emphasis.textContent) === "zh-CN") emphasis.className = "dotted";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table-frame";
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", t("table.region"));
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

/** Draws a growing Markdown text into `container`. */
class ProseView {
  constructor(container) {
    this.container = container;
    this.clear();
  }

  clear() {
    this.parts = []; // { raw, element, final }: the blocks drawn, in order
    this.container.replaceChildren();
    this.settled = 0; // characters of the text that are in finished blocks
    this.settledParts = 0;
    this.text = "";
  }

  /** Show `text`; `final` when nothing will be added to it. */
  update(text, final) {
    const clean = text.replace(/\r\n?/g, "\n");
    if (!clean.startsWith(this.text)) this.clear();
    this.text = clean;
    if (final) return this.draw(0, blocks(clean), true);
    const tail = blocks(clean.slice(this.settled));
    this.draw(this.settledParts, tail, false);
    // All but the last visible block are finished. (A blank line is a "space" token and belongs to nobody.)
    let last = tail.length - 1;
    while (last > 0 && tail[last].type === "space") last -= 1;
    const before = tail.slice(0, Math.max(0, last));
    const length = before.reduce((sum, token) => sum + token.raw.length, 0);
    if (clean.startsWith(before.map((token) => token.raw).join(""), this.settled)) {
      this.settled += length;
      this.settledParts += before.length;
    }
  }

  draw(from, tokens, final) {
    const hasDefinitions = final && tokens.some((token) => token.type === "def");
    tokens.forEach((token, offset) => {
      const index = from + offset;
      const finished = final || offset < tokens.length - 1;
      const part = this.parts[index];
      if (part && part.raw === token.raw && !hasDefinitions) {
        if (finished && !part.final) this.finish(part);
        return;
      }
      const element = part?.element ?? this.container.appendChild(document.createElement("div"));
      element.className = CLASSES[token.type] ?? "block";
      element.classList.toggle("growing", !finished);
      element.replaceChildren(dress(blockToDom(token)));
      this.parts[index] = { raw: token.raw, element, final: false };
      if (finished) this.finish(this.parts[index]);
      else if (token.type === "code" && token.text && token.text.length < LIVE_COLOURS) this.colour(element);
    });
    for (const part of this.parts.splice(from + tokens.length)) part.element.remove();
  }

  /** A block that will not change any more gets its colours. */
  finish(part) {
    part.final = true;
    part.element.classList.remove("growing");
    this.colour(part.element);
  }

  colour(element) {
    for (const code of element.querySelectorAll("pre > code")) {
      highlight(code, /language-(\S+)/.exec(code.className)?.[1] ?? "");
    }
  }
}

async function onClick(event) {
  const button = event.target.closest?.(".copy-code");
  if (!button) return;
  const code = button.closest(".code-block").querySelector("pre").textContent;
  const done = await copyText(code.replace(/\n$/, ""));
  button.textContent = t(done ? "copy.done" : "copy.failed");
  announce(button.textContent);
  setTimeout(() => (button.textContent = t("code.copy")), 1600);
}

/** `text` as Markdown. `streaming`: more will come. `onPaint(ms)` hears what a drawing cost. */
export function Prose({ text, streaming = false, onPaint }) {
  const container = useRef(null);
  const view = useRef(null);
  const shownIn = useRef("");
  const words = language.value;
  useLayoutEffect(() => {
    view.current ??= new ProseView(container.current);
    if (shownIn.current !== words) view.current.clear(); // the buttons' labels are words too
    shownIn.current = words;
    const start = performance.now();
    view.current.update(text, !streaming);
    onPaint?.(performance.now() - start);
  }, [text, streaming, words]);
  useEffect(() => {
    const element = container.current;
    element.addEventListener("click", onClick);
    return () => element.removeEventListener("click", onClick);
  }, []);
  return html`<div class="prose ${streaming ? "streaming" : ""}" dir="auto" lang=${languageOf(text)} ref=${container}></div>`;
}
