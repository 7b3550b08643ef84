// How answers are made: the model, the system prompt and the sampling settings; their ranges, defaults, and what of them
// is sent. The panel that edits them is settings-panel.js. Names, ranges and meanings are the server's (docs: sampling).
//
// Sent always: temperature, top_p, max_tokens. Sent only when they do something: the rest, so that the page also works
// with other OpenAI-compatible servers, which refuse fields they do not know.

import { readStored, writeStored } from "./preferences.js";
import { effect, signal } from "./ui.js";

const STORED = "bimo.settings";

/** One row a setting. kind: "slider" (number with a range control), "integer", "text", "lines" (one string a line).
 * `neutral`: the value that changes nothing and is therefore not sent; null stands for "not set". */
export const FIELDS = [
  { name: "temperature", kind: "slider", min: 0, max: 2, step: 0.05, initial: 0.7 },
  { name: "top_p", kind: "slider", min: 0.01, max: 1, step: 0.01, initial: 0.9 },
  { name: "top_k", kind: "integer", min: 0, max: 1000, step: 1, initial: 0, neutral: 0 },
  { name: "min_p", kind: "slider", min: 0, max: 1, step: 0.01, initial: 0, neutral: 0 },
  { name: "repetition_penalty", kind: "slider", min: 1, max: 2, step: 0.01, initial: 1.1, neutral: 1 },
  { name: "max_tokens", kind: "integer", min: 1, max: 1_000_000, step: 1, initial: 2048, optional: true },
  { name: "seed", kind: "integer", min: 0, max: 4_294_967_295, step: 1, initial: null, optional: true },
  { name: "stop", kind: "lines", initial: [], maximum: 4 },
];

const INITIAL = {
  model: "",
  system: "",
  ...Object.fromEntries(FIELDS.map(({ name, initial }) => [name, initial])),
};

/** `value` made fit for `field`: in range, of its type; the default when it cannot be. */
export function fit(field, value) {
  if (field.kind === "lines") {
    if (!Array.isArray(value)) return field.initial;
    return value.filter((line) => typeof line === "string" && line).slice(0, field.maximum);
  }
  if (value === null || value === "") return field.optional ? null : field.initial;
  const number = Number(value);
  if (!Number.isFinite(number)) return field.initial;
  const inside = Math.min(field.max, Math.max(field.min, number));
  return field.kind === "integer" ? Math.round(inside) : inside;
}

function restored() {
  const stored = readStored(STORED, {});
  const value = { ...INITIAL };
  for (const name of ["model", "system"]) if (typeof stored[name] === "string") value[name] = stored[name];
  for (const field of FIELDS) if (Object.hasOwn(stored, field.name)) value[field.name] = fit(field, stored[field.name]);
  return value;
}

export const settings = signal(restored());

// Only what differs from the defaults is stored: a better default in a later version then reaches everybody who has
// not chosen otherwise.
effect(() => {
  const changed = Object.entries(settings.value).filter(([name, value]) => isChanged(name, value));
  writeStored(STORED, Object.fromEntries(changed));
});

/** Whether setting `name` differs from its default. */
export function isChanged(name, value = settings.value[name]) {
  return JSON.stringify(value) !== JSON.stringify(INITIAL[name]);
}

export function change(name, value) {
  settings.value = { ...settings.value, [name]: value };
}

/** Back to the default: one setting, or, without a name, all of them but the model. */
export function reset(name) {
  if (name) change(name, INITIAL[name]);
  else settings.value = { ...INITIAL, model: settings.value.model };
}

/** The sampling part of a chat completion's body. */
export function requestFields(value = settings.value) {
  const body = {};
  for (const field of FIELDS) {
    const setting = value[field.name];
    if (field.kind === "lines" ? setting.length : setting !== null && setting !== field.neutral) body[field.name] = setting;
  }
  return body;
}
