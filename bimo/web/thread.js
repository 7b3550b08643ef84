// The conversation on screen: its messages, or, for a new chat, a greeting and a few first questions. It follows a
// growing answer until the reader scrolls up, and then leaves the page where the reader put it.

import { currentRun, send } from "./chat.js";
import { editing, fillComposer } from "./composer.js";
import { thread } from "./conversation.js";
import { icon } from "./icons.js";
import { list, t } from "./i18n.js";
import { current } from "./library.js";
import { Message } from "./message.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const NEAR = 48; // px from the end that still count as "at the end"

/** Follow the end of `scroller` as its content grows. Returns [following, jump]. */
function useFollow(scroller, content, conversationId) {
  const [following, setFollowing] = useState(true);
  const state = useRef({ following: true, top: 0 });
  const set = (value) => {
    state.current.following = value;
    setFollowing(value);
  };
  const jump = () => {
    set(true);
    scroller.current.scrollTop = scroller.current.scrollHeight;
  };

  useLayoutEffect(jump, [conversationId]);

  useEffect(() => {
    const element = scroller.current;
    const distance = () => element.scrollHeight - element.clientHeight - element.scrollTop;
    // Only a movement upwards is the reader's: content that grows changes the distance, but never lowers scrollTop.
    const onScroll = () => {
      const up = element.scrollTop < state.current.top - 1;
      state.current.top = element.scrollTop;
      if (distance() < NEAR) set(true);
      else if (up) set(false);
    };
    const keepUp = () => {
      if (state.current.following && !editing.peek()) element.scrollTop = element.scrollHeight;
    };
    const observer = new ResizeObserver(keepUp);
    observer.observe(content.current);
    observer.observe(element); // the on-screen keyboard changes the height as well
    element.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      observer.disconnect();
      element.removeEventListener("scroll", onScroll);
    };
  }, []);
  return [following, jump];
}

function Greeting() {
  return html`<div class="greeting">
    <img class="greeting-mark" src="/static/favicon.svg" alt="" width="64" height="64" />
    <h1>${t("greeting.title")}</h1>
    <p class="quiet">${t("greeting.text")}</p>
    <ul class="examples">
      ${list("greeting.examples").map(([label, prompt]) => html`<li key=${prompt}>
        <button type="button" class="example" onClick=${() => send(prompt) && fillComposer()}>
          <span class="example-label">${label}</span><span>${prompt}</span>
        </button></li>`)}
    </ul>
  </div>`;
}

export function Thread() {
  const scroller = useRef(null);
  const content = useRef(null);
  const conversation = current.value;
  const messages = thread(conversation);
  const [following, jump] = useFollow(scroller, content, conversation.id);

  // One's own question brings the end back into view, wherever one was reading.
  const running = currentRun.value?.nodeId;
  useLayoutEffect(() => {
    if (running) jump();
  }, [running]);

  // A message's key is its place in the thread: another version takes the place over, and its buttons keep the focus.
  return html`<div class="thread-frame">
    <div class="thread" ref=${scroller}>
      <div class="thread-content" ref=${content}>
        ${messages.length === 0
          ? html`<${Greeting} />`
          : html`<div role="log" aria-live="off" aria-label=${t("thread.label")}>
              ${messages.map((node, index) => html`<${Message} key=${node.parent} node=${node}
                last=${index === messages.length - 1} />`)}
            </div>`}
      </div>
    </div>
    ${!following && html`<button type="button" class="jump icon-button" aria-label=${t("thread.jump")} title=${t("thread.jump")}
      onClick=${jump}>${icon("down")}</button>`}
  </div>`;
}
