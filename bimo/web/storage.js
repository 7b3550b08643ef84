// Conversations kept in the browser: IndexedDB, one record each, and a second small store for the sidebar's lines, so
// that a page with a thousand conversations opens without reading them.
//
//   await openStorage(onProblem)      "kept" or "memory"
//   await allSummaries(), loadConversation(id), saveConversation(conversation), eraseConversation(id), ...
//
// Nothing here rejects because the browser will not store: a page in private mode, or on a full disk, still chats.
// What could not be written stays in `unsaved` until the page closes, and `onProblem("memory" | "full")` says so once.

import { summaryOf } from "./conversation.js";

const DATABASE = "bimo";
const OPEN_TIMEOUT = 3000; // ms; an upgrade blocked by another tab never answers

let database = null;
let report = () => {};
const unsaved = new Map();
const channel = "BroadcastChannel" in window ? new BroadcastChannel("bimo") : null;

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function committed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** Open the database; "memory" when the browser forbids it. `onProblem` hears of later failures. */
export async function openStorage(onProblem) {
  report = onProblem;
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("summaries", { keyPath: "id" });
    };
    const late = new Promise((_, reject) => setTimeout(() => reject(new Error("timeout")), OPEN_TIMEOUT));
    database = await Promise.race([finished(request), late]);
    database.onversionchange = () => database.close(); // do not block another tab's upgrade
    return "kept";
  } catch {
    database = null;
    report("memory");
    return "memory";
  }
}

/** Call `heard(id)` when another tab has saved or erased a conversation ("" for: all of them may have changed). */
export function onForeignChange(heard) {
  if (channel) channel.onmessage = (event) => heard(String(event.data ?? ""));
}

async function read(store, run) {
  if (!database) return undefined;
  try {
    return await finished(run(database.transaction(store).objectStore(store)));
  } catch {
    return undefined;
  }
}

async function write(id, run) {
  if (!database) return false;
  try {
    const transaction = database.transaction(["conversations", "summaries"], "readwrite");
    run(transaction.objectStore("conversations"), transaction.objectStore("summaries"));
    await committed(transaction);
    channel?.postMessage(id);
    return true;
  } catch (error) {
    report(error?.name === "QuotaExceededError" ? "full" : "memory");
    return false;
  }
}

/** Every conversation's sidebar line, latest first. */
export async function allSummaries() {
  const summaries = new Map(((await read("summaries", (store) => store.getAll())) ?? []).map((line) => [line.id, line]));
  for (const conversation of unsaved.values()) summaries.set(conversation.id, summaryOf(conversation));
  return [...summaries.values()].sort((a, b) => b.updated - a.updated);
}

/** One conversation, or undefined. */
export async function loadConversation(id) {
  return unsaved.get(id) ?? (await read("conversations", (store) => store.get(id)));
}

/** Every conversation whole, for export. */
export async function allConversations() {
  const stored = (await read("conversations", (store) => store.getAll())) ?? [];
  const all = new Map(stored.map((conversation) => [conversation.id, conversation]));
  for (const [id, conversation] of unsaved) all.set(id, conversation);
  return [...all.values()];
}

/** Keep `conversation`; when the browser cannot, it is kept until the page closes. */
export async function saveConversation(conversation) {
  unsaved.set(conversation.id, conversation); // readers see it while the transaction is on its way
  const written = await write(conversation.id, (conversations, summaries) => {
    conversations.put(conversation);
    summaries.put(summaryOf(conversation));
  });
  if (written && unsaved.get(conversation.id) === conversation) unsaved.delete(conversation.id);
}

/** Forget one conversation. */
export async function eraseConversation(id) {
  unsaved.delete(id);
  await write(id, (conversations, summaries) => {
    conversations.delete(id);
    summaries.delete(id);
  });
}

/** Forget all conversations. */
export async function eraseAll() {
  unsaved.clear();
  await write("", (conversations, summaries) => {
    conversations.clear();
    summaries.clear();
  });
}

/** Ids of conversations with `words` in a message, read one at a time so that memory stays flat; stops when `signal` aborts. */
export async function searchMessages(words, signal) {
  const wanted = words.toLowerCase();
  const found = new Set();
  const look = (conversation) => {
    if (Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(wanted))) {
      found.add(conversation.id);
    }
  };
  unsaved.forEach(look);
  if (!database) return found;
  return new Promise((resolve) => {
    const request = database.transaction("conversations").objectStore("conversations").openCursor();
    request.onerror = () => resolve(found);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || signal.aborted) return resolve(found);
      look(cursor.value);
      cursor.continue();
    };
  });
}
