// The one place that knows which view library is used: Preact with htm templates (no build step) and signals for state.
//
//   import { html, useState, signal } from "./ui.js";
//   const count = signal(0);
//   const Counter = () => html`<button onClick=${() => count.value++}>${count.value}</button>`;
//
// A component that reads `signal.value` while rendering is rendered again when that signal changes, and only then.

import { Component, h, render } from "./vendor/preact.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-hooks.js";
import { batch, computed, effect, signal } from "./vendor/signals.js";
import htm from "./vendor/htm.js";
import { icon } from "./icons.js";

export { batch, computed, effect, render, signal, useEffect, useLayoutEffect, useRef, useState };

export const html = htm.bind(h);

/** `component` rendered again only when one of its props is another value (or a signal it reads has changed). */
export function memo(component) {
  return class Memo extends Component {
    shouldComponentUpdate(next) {
      const props = this.props;
      return Object.keys({ ...props, ...next }).some((name) => props[name] !== next[name]);
    }
    render(props) {
      return h(component, props);
    }
  };
}

/** A button that shows only a picture: `label` is its accessible name and its tooltip. */
export function IconButton({ name, label, class: extra = "", ...rest }) {
  return html`<button type="button" class="icon-button ${extra}" aria-label=${label} title=${label} ...${rest}>
    ${icon(name)}
  </button>`;
}

/** True for the Enter that means "done", false for the one that picks a word in a Chinese input method.
 * Safari ends the composition before that keydown arrives; 229 is what it then reports. */
export function isPlainEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** True while an input method is composing: Escape then belongs to it as well. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Unique id. `crypto.randomUUID` exists only on https and localhost; a server on the office network is neither. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Copy `text`; resolves to whether it worked. The clipboard API, too, is missing on plain http. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "offscreen";
    area.setAttribute("readonly", "");
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus?.();
    return done;
  }
}

/** Save `text` as a file of the user's. */
export function downloadText(text, filename, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** "zh" for text with Chinese characters, "ja" with kana, "ko" with hangul, else "en": fonts and screen readers ask. */
export function languageOf(text) {
  if (/[\u3040-\u30ff]/.test(text)) return "ja";
  if (/[\uac00-\ud7af]/.test(text)) return "ko";
  return /[\u3400-\u9fff\uf900-\ufaff]/.test(text) ? "zh-CN" : "en";
}
