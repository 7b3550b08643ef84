// Asking and answering: send, edit, regenerate, retry, stop. One running answer a conversation, several conversations at
// once; an answer goes on while another conversation is on screen.
//
// The text that is streaming lives in its Run's signal, not in the conversation: a token redraws one message, and the
// conversation (and its record on disk) changes only once a second and at the end.

import { ApiError, listModels, streamChat } from "./api.js";
import { addNode, changeNode, emptyConversation, removeNode, requestMessages, splitReasoning, thread } from "./conversation.js";
import { ask, current, holdOpen, inHand, update } from "./library.js";
import { requestFields, settings } from "./settings.js";
import { computed, signal } from "./ui.js";

const SAVE_EVERY = 1000; // ms between checkpoints of a running answer: what a crash of the browser may cost

/** Answers on their way: Map of conversation id -> Run. */
export const runs = signal(new Map());
/** The one in the conversation on screen, or undefined. */
export const currentRun = computed(() => runs.value.get(current.value.id));

/** state: "connecting" | "ready" | "loading" | "key" | "down"; models as /v1/models gives them. */
export const server = signal({ state: "connecting", models: [] });

/** The model that answers: the chosen one if the server has it, else the server's first. */
export const model = computed(() => {
  const { models } = server.value;
  return models.find(({ id }) => id === settings.value.model) ?? models[0] ?? null;
});

/** One answer on its way. */
class Run {
  text = signal(""); // everything received so far
  reasoning = "";
  controller = new AbortController();
  started = performance.now();
  first = 0; // when the first piece came
  last = 0;
  pieces = 0;
  usage = null;
  finish = "";
  #waiting = "";
  #scheduled = false;
  paintCost = 0; // ms the last drawing took; the view reports it

  constructor(nodeId) {
    this.nodeId = nodeId;
    this.ended = new Promise((resolve) => (this.end = resolve));
  }

  take({ text = "", reasoning = "" }) {
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
    this.reasoning += reasoning;
    this.#waiting += text;
    if (this.#scheduled) return;
    // At most one drawing a frame, and never more than a quarter of the time spent on drawing. A hidden tab has no
    // frames: there a timer keeps the text coming.
    this.#scheduled = true;
    const paint = () => {
      this.#scheduled = false;
      this.flush();
    };
    if (document.hidden || this.paintCost > 6) setTimeout(paint, Math.max(50, 4 * this.paintCost));
    else requestAnimationFrame(paint);
  }

  flush() {
    if (this.#waiting || this.reasoning) this.text.value += this.#waiting;
    this.#waiting = "";
  }

  /** What the message keeps. */
  fields() {
    const received = this.text.peek() + this.#waiting;
    const split = splitReasoning(received);
    const fields = { content: split.content, timing: { wait: this.first ? this.first - this.started : 0, stream: this.last - this.first } };
    const reasoning = this.reasoning.trim() || split.reasoning;
    if (reasoning) fields.reasoning = reasoning;
    fields.usage = this.usage
      ? {
          prompt: this.usage.prompt_tokens,
          completion: this.usage.completion_tokens,
          cached: this.usage.prompt_tokens_details?.cached_tokens ?? 0,
        }
      : { pieces: this.pieces };
    return fields;
  }
}

function setRun(id, run) {
  const next = new Map(runs.peek());
  if (run) next.set(id, run);
  else next.delete(id);
  runs.value = next;
}

const modelName = () => model.peek()?.id ?? settings.peek().model;

/** Let the model answer the message `questionId`; resolves when the answer has ended, however it ended. */
async function answer(conversation, questionId) {
  let name = modelName();
  const messages = requestMessages(conversation, questionId, settings.peek().system);
  const [started, node] = addNode(conversation, questionId, { role: "assistant", content: "", model: name });
  const run = new Run(node.id);
  update(started);
  holdOpen(conversation.id, true);
  setRun(conversation.id, run);
  const keep = (fields) => {
    const latest = inHand(conversation.id);
    if (latest?.nodes[node.id]) update(changeNode(latest, node.id, fields));
  };
  const save = () => keep(run.fields());
  const checkpoint = setInterval(save, SAVE_EVERY);
  window.addEventListener("pagehide", save);
  const end = {};
  try {
    if (server.peek().state === "connecting") {
      await attempt?.done; // a question quicker than the list of models waits for it
      name = modelName();
      keep({ model: name });
    }
    for await (const piece of streamChat({ model: name, messages, ...requestFields() }, run.controller.signal)) {
      if (piece.usage) run.usage = piece.usage;
      else if (piece.finish) run.finish = piece.finish;
      else run.take(piece);
    }
    end.finish = run.finish;
  } catch (error) {
    if (error.name === "AbortError") end.finish = "stopped";
    else {
      const known = error instanceof ApiError ? error : new ApiError("server", { detail: String(error?.message ?? "") });
      end.finish = "interrupted";
      end.error = known.toJSON();
      if (["key", "network", "loading", "model"].includes(known.kind)) connect();
    }
  } finally {
    clearInterval(checkpoint);
    window.removeEventListener("pagehide", save);
    run.flush();
    keep({ ...run.fields(), ...end });
    holdOpen(conversation.id, false);
    setRun(conversation.id, null);
    run.end();
  }
}

const busy = (id) => runs.peek().has(id);

/** Ask `text` at the end of the conversation on screen. */
export function send(text) {
  const conversation = current.peek();
  if (!text.trim() || busy(conversation.id)) return false;
  const [next, node] = ask(conversation, thread(conversation).at(-1)?.id ?? "", text.trim().toWellFormed());
  answer(next, node.id);
  return true;
}

/** Ask again with another text: a new version of the question `id`. */
export function resend(id, text) {
  const conversation = current.peek();
  if (!text.trim() || busy(conversation.id)) return false;
  const [next, node] = ask(conversation, conversation.nodes[id].parent, text.trim().toWellFormed());
  answer(next, node.id);
  return true;
}

/** Another answer to the same question. An answer that failed without a word is replaced, others stay as versions. */
export function regenerate(id) {
  let conversation = current.peek();
  if (busy(conversation.id)) return;
  const { parent, content, reasoning } = conversation.nodes[id];
  if (!content && !reasoning) conversation = removeNode(conversation, id);
  answer(conversation, parent);
}

/** The last question again in a new chat: the way out when a conversation has outgrown the context. */
export function continueInNewChat(answerId) {
  const conversation = current.peek();
  const question = conversation.nodes[conversation.nodes[answerId]?.parent];
  current.value = emptyConversation();
  return question?.content ?? "";
}

/** Stop the answer in conversation `id` (default: the one on screen); what has come stays. Returns a promise of its end,
 * or null when nothing was running. */
export function stop(id = current.peek().id) {
  const run = runs.peek().get(id);
  run?.controller.abort();
  return run?.ended ?? null;
}

/** Stop every answer, wherever it is being written. */
export function stopAll() {
  return Promise.all([...runs.peek().keys()].map((id) => stop(id)));
}

let attempt = null;

/** Ask the server which models it has; while it cannot say, ask again by itself. */
export function connect() {
  clearTimeout(attempt?.timer);
  attempt = { timer: 0 };
  attempt.done = askForModels(attempt);
  return attempt.done;
}

async function askForModels(mine) {
  try {
    const models = await listModels();
    if (mine !== attempt) return;
    server.value = { state: models.length ? "ready" : "down", models };
    if (!models.length) mine.timer = setTimeout(connect, 3000);
  } catch (error) {
    if (mine !== attempt) return;
    const state = error.kind === "key" ? "key" : error.kind === "loading" ? "loading" : "down";
    server.value = { ...server.peek(), state };
    if (state !== "key") mine.timer = setTimeout(connect, state === "loading" ? 1000 : 3000);
  }
}
