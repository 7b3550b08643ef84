// The conversations as the page sees them: the list, the open one, and every change to them. State is signals; each
// change goes to storage.js at once. Running answers are chat.js's; this file knows no network.

import { addNode, emptyConversation, readConversation, showVersion, summaryOf } from "./conversation.js";
import { allConversations, allSummaries, eraseAll, eraseConversation, loadConversation, onForeignChange,
  openStorage, saveConversation } from "./storage.js";
import { batch, signal } from "./ui.js";

/** Sidebar lines, latest first. */
export const summaries = signal([]);
/** The conversation on screen; one without messages is a new chat and is not stored yet. */
export const current = signal(emptyConversation());
/** "" | "memory" (nothing is kept) | "full" (nothing more is kept). */
export const storageProblem = signal("");

const open = new Map(); // conversations with an answer on its way, which may not be the one on screen

/** Read the list; call before the page is drawn. `isBusy(id)`: this tab is writing to it and knows better than others. */
export async function openLibrary(isBusy) {
  await openStorage((problem) => (storageProblem.value = problem));
  summaries.value = await allSummaries();
  onForeignChange(async (id) => {
    summaries.value = await allSummaries();
    if (id && id === current.peek().id && !isBusy(id)) {
      const fresh = await loadConversation(id);
      if (fresh && id === current.peek().id) current.value = fresh;
    }
  });
}

/** The newest value of a conversation this page has in hand, or undefined. */
export function inHand(id) {
  return current.peek().id === id ? current.peek() : open.get(id);
}

/** Keep a conversation in hand while an answer is written into it, on screen or not. */
export function holdOpen(id, hold) {
  const conversation = inHand(id);
  if (hold && conversation) open.set(id, conversation);
  else open.delete(id);
}

/** Put a changed conversation everywhere it is shown, and store it. `reorder` false: the list keeps its order. */
export function update(conversation, { reorder = true } = {}) {
  batch(() => {
    if (open.has(conversation.id)) open.set(conversation.id, conversation);
    if (current.peek().id === conversation.id) current.value = conversation;
    const line = summaryOf(conversation);
    const lines = summaries.peek();
    const index = lines.findIndex(({ id }) => id === line.id);
    if (index < 0) summaries.value = [line, ...lines];
    else if (!reorder) summaries.value = lines.with(index, { ...line, updated: lines[index].updated });
    else summaries.value = [line, ...lines.toSpliced(index, 1)];
  });
  return saveConversation(conversation);
}

/** Show the conversation `id`; false when there is none. "" shows a new chat. */
export async function show(id) {
  if (!id) {
    if (Object.keys(current.peek().nodes).length) current.value = emptyConversation();
    return true;
  }
  const conversation = inHand(id) ?? (await loadConversation(id));
  if (!conversation) return false;
  current.value = conversation;
  return true;
}

/** Show another version of a message. */
export function chooseVersion(id) {
  const conversation = current.peek();
  update(showVersion(conversation, id), { reorder: false });
}

export async function rename(id, title) {
  const conversation = inHand(id) ?? (await loadConversation(id));
  if (conversation && title.trim()) update({ ...conversation, title: title.trim().slice(0, 200), named: true }, { reorder: false });
}

/** Forget a conversation; returns it, so that `restore` can bring it back. */
export async function erase(id) {
  const conversation = inHand(id) ?? (await loadConversation(id));
  batch(() => {
    open.delete(id);
    summaries.value = summaries.peek().filter((line) => line.id !== id);
    if (current.peek().id === id) current.value = emptyConversation();
  });
  await eraseConversation(id);
  return conversation;
}

/** Bring back what `erase` returned, in its old place. */
export async function restore(conversation) {
  await saveConversation(conversation);
  summaries.value = await allSummaries();
}

export async function eraseEverything() {
  batch(() => {
    open.clear();
    summaries.value = [];
    current.value = emptyConversation();
  });
  await eraseAll();
}

/** All conversations as the text of a JSON file. */
export async function exportText() {
  const conversations = await allConversations();
  return JSON.stringify({ format: "bimo-conversations", version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}

/** Take in a file written by `exportText`. Of two versions of a conversation the later stays.
 * Returns { added, skipped }; throws SyntaxError when the text is not such a file. */
export async function importText(text) {
  const data = JSON.parse(text);
  if (data?.format !== "bimo-conversations" || !Array.isArray(data.conversations)) throw new SyntaxError("not an export of bimo");
  let added = 0;
  for (const value of data.conversations) {
    const conversation = readConversation(value);
    const known = conversation && (inHand(conversation.id) ?? (await loadConversation(conversation.id)));
    if (!conversation || (known && known.updated >= conversation.updated)) continue;
    await saveConversation(conversation);
    if (current.peek().id === conversation.id) current.value = conversation;
    added += 1;
  }
  summaries.value = await allSummaries();
  return { added, skipped: data.conversations.length - added };
}

/** A question added to `conversation` under `parent`; returns [conversation, node], shown and stored. */
export function ask(conversation, parent, content) {
  const [next, node] = addNode(conversation, parent, { role: "user", content });
  update(next);
  return [next, node];
}
