// A conversation as data: a tree of messages, and what can be done with it. No DOM, no storage, no network.
//
// Editing a question or regenerating an answer adds a sibling and loses nothing. `chosen` says, for each message (and ""
// for the beginning), which child is shown; following it from "" gives the thread on screen:
//
//     ""  ── question ──┬── answer 1
//                       └── answer 2 (chosen) ── question ── ...
//
//   conversation  { id, title, named, created, updated, chosen: {parent: child}, nodes: {id: node} }
//   node          { id, parent, role: "user" | "assistant", content, created,
//                   and for answers: model, reasoning, finish, usage, timing, error }
//
// Values are never changed in place: every function returns a new conversation that shares the untouched nodes, so the
// page redraws only messages whose node is another object.

import { newId } from "./ui.js";

const MAX_TITLE = 60; // characters; about one line in the sidebar
const FINISHES = ["stop", "length", "content_filter", "tool_calls", "stopped", "interrupted"];

/** A conversation without messages. */
export function emptyConversation() {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, chosen: {}, nodes: {} };
}

/** A title from the first message: its first line without Markdown signs, cut between characters, not inside an emoji. */
export function titleFrom(text) {
  const line = text.split("\n").map((part) => part.replace(/^[#>*\-\s`]+/, "").trim()).find(Boolean) ?? "";
  const start = line.slice(0, 400);
  const characters = Intl.Segmenter ? Array.from(new Intl.Segmenter().segment(start), (part) => part.segment) : [...start];
  return characters.length > MAX_TITLE ? `${characters.slice(0, MAX_TITLE - 1).join("").trimEnd()}…` : line;
}

/** `conversation` with a message added under `parent` and shown; returns [conversation, node]. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), ...fields };
  const next = {
    ...conversation,
    updated: node.created,
    nodes: { ...conversation.nodes, [node.id]: node },
    chosen: { ...conversation.chosen, [parent]: node.id },
  };
  if (!next.title && node.role === "user") next.title = titleFrom(node.content);
  return [next, node];
}

/** `conversation` with some fields of one message replaced. */
export function changeNode(conversation, id, fields) {
  const node = { ...conversation.nodes[id], ...fields };
  return { ...conversation, updated: Date.now(), nodes: { ...conversation.nodes, [id]: node } };
}

/** `conversation` without the message `id` and what follows it; a sibling, if there is one, is shown instead. */
export function removeNode(conversation, id) {
  const nodes = { ...conversation.nodes };
  const chosen = { ...conversation.chosen };
  const { parent } = nodes[id];
  const doomed = [id];
  for (const current of doomed) {
    for (const node of Object.values(nodes)) if (node.parent === current) doomed.push(node.id);
    delete nodes[current];
    delete chosen[current];
  }
  const left = Object.values(nodes).filter((node) => node.parent === parent);
  if (left.length) chosen[parent] = left.at(-1).id;
  else delete chosen[parent];
  return { ...conversation, nodes, chosen, updated: Date.now() };
}

/** The messages on screen, first to last. */
export function thread(conversation) {
  const shown = [];
  for (let id = conversation.chosen[""]; id && conversation.nodes[id]; id = conversation.chosen[id]) {
    shown.push(conversation.nodes[id]);
  }
  return shown;
}

/** Ids of the versions of message `id` (itself among them), oldest first. */
export function versions(conversation, id) {
  const { parent, role } = conversation.nodes[id];
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent && node.role === role)
    .map((node) => node.id);
}

/** `conversation` showing the version `id`, and below it whatever was shown there last. */
export function showVersion(conversation, id) {
  return { ...conversation, chosen: { ...conversation.chosen, [conversation.nodes[id].parent]: id } };
}

/** What the API is sent to answer the message `lastId`: the system prompt, then the thread that leads to it.
 * Answers that failed before their first word are left out; so is what a model thought before it answered. */
export function requestMessages(conversation, lastId, systemPrompt) {
  const messages = [];
  for (let node = conversation.nodes[lastId]; node; node = conversation.nodes[node.parent]) {
    if (node.role === "user" || node.content) messages.unshift({ role: node.role, content: node.content });
  }
  if (systemPrompt.trim()) messages.unshift({ role: "system", content: systemPrompt });
  return messages;
}

/** The sidebar's line about a conversation. */
export function summaryOf({ id, title, created, updated }) {
  return { id, title, created, updated };
}

/** A model's `<think>…</think>` opening taken apart: { reasoning, content, thinking } (thinking: it has not closed yet).
 * Empty lines before the first word are not content. */
export function splitReasoning(text) {
  const opening = /^\s*<think>/.exec(text);
  if (!opening) return { reasoning: "", content: text.replace(/^\s*(\n|$)/, ""), thinking: false };
  const rest = text.slice(opening[0].length);
  const end = rest.indexOf("</think>");
  if (end < 0) return { reasoning: rest.trim(), content: "", thinking: true };
  return { reasoning: rest.slice(0, end).trim(), content: rest.slice(end + 8).trimStart(), thinking: false };
}

const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isTime = (value) => Number.isFinite(value) && value > 0 && value < 8.64e15; // what Date can hold

function cleanNode(value) {
  const known = isRecord(value) && typeof value.id === "string" && value.id && typeof value.parent === "string";
  if (!known || !["user", "assistant"].includes(value.role) || typeof value.content !== "string") return null;
  const node = { id: value.id, parent: value.parent, role: value.role, content: value.content, created: Date.now() };
  if (isTime(value.created)) node.created = value.created;
  if (value.role === "user") return node;
  for (const name of ["model", "reasoning"]) if (typeof value[name] === "string") node[name] = value[name];
  node.finish = FINISHES.includes(value.finish) ? value.finish : "interrupted";
  for (const name of ["usage", "timing"]) {
    if (!isRecord(value[name])) continue;
    node[name] = Object.fromEntries(Object.entries(value[name]).filter(([, number]) => Number.isFinite(number)));
  }
  return node;
}

/** A conversation read from a file, rebuilt from known fields only; null when it is not one.
 * Files are as untrusted as a model's text: unknown fields, orphans and cycles do not get in. */
export function readConversation(value) {
  if (!isRecord(value) || typeof value.id !== "string" || !/^[\w-]{1,64}$/.test(value.id)) return null;
  if (!isRecord(value.nodes)) return null;
  const candidates = new Map();
  for (const raw of Object.values(value.nodes)) {
    const node = cleanNode(raw);
    if (node) candidates.set(node.id, node);
  }
  // Breadth first from the beginning: what is not reachable, a cycle for one, is never visited.
  const nodes = {};
  const chosen = {};
  const queue = [""];
  for (const parent of queue) {
    const children = [...candidates.values()].filter((node) => node.parent === parent);
    for (const node of children) {
      nodes[node.id] = node;
      candidates.delete(node.id);
      queue.push(node.id);
    }
    const wanted = isRecord(value.chosen) && Object.hasOwn(value.chosen, parent) ? value.chosen[parent] : "";
    const shown = children.find((node) => node.id === wanted) ?? children.at(-1);
    if (shown) chosen[parent] = shown.id;
  }
  if (!Object.keys(nodes).length) return null;
  const first = nodes[chosen[""]];
  return {
    id: value.id,
    title: typeof value.title === "string" && value.title.trim() ? value.title.slice(0, 200) : titleFrom(first.content),
    named: value.named === true,
    created: isTime(value.created) ? value.created : first.created,
    updated: isTime(value.updated) ? value.updated : first.created,
    chosen,
    nodes,
  };
}
