// The OpenAI-compatible API as the page uses it: list the models, stream one chat completion. Everything that can go
// wrong leaves as an ApiError with a `kind` the page has a sentence for; no other exception type gets out but AbortError.

import { apiKey } from "./preferences.js";

/** kind: "key" | "busy" | "context" | "model" | "loading" | "request" | "server" | "network" | "interrupted".
 * `detail` is the server's own sentence, "" when it sent none. */
export class ApiError extends Error {
  constructor(kind, { detail = "", status = 0, retryAfter = 0, promptTokens = 0, contextLength = 0 } = {}) {
    super(detail || kind);
    Object.assign(this, { name: "ApiError", kind, detail, status, retryAfter, promptTokens, contextLength });
  }

  /** What a message keeps of it: plain data, storable. */
  toJSON() {
    const { kind, detail, status, retryAfter, promptTokens, contextLength } = this;
    return { kind, detail, status, retryAfter, promptTokens, contextLength };
  }
}

const KINDS = { 401: "key", 403: "key", 404: "model", 429: "busy", 503: "loading" };

/** Seconds from a Retry-After header: a number or a date. */
function retrySeconds(header) {
  if (!header) return 0;
  const seconds = Number.isFinite(Number(header)) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(1, Math.ceil(seconds) || 1);
}

/** Both numbers of a "prompt too long" error: from fields when the server has them, else from its sentence, in which
 * the larger number is the prompt's (that is what the complaint is about). null for any other error. */
function contextNumbers(error) {
  const coded = /context_length/.test(`${error.code} ${error.type}`);
  if (!coded && !/maximum context|context (length|window|size)/i.test(error.message ?? "")) return null; // other servers
  if (error.prompt_tokens && error.context_length) {
    return { promptTokens: error.prompt_tokens, contextLength: error.context_length };
  }
  const numbers = (error.message?.match(/\d[\d,]*/g) ?? []).map((text) => Number(text.replaceAll(",", "")));
  const large = numbers.filter((value) => value >= 16);
  if (large.length < 2) return coded ? {} : null;
  return { promptTokens: Math.max(...large), contextLength: Math.min(...large) };
}

function errorFrom(status, headers, error) {
  const detail = typeof error?.message === "string" ? error.message.slice(0, 2000) : "";
  const known = { status, detail, retryAfter: retrySeconds(headers?.get("retry-after")) };
  const numbers = status < 500 && error ? contextNumbers(error) : null;
  if (numbers) return new ApiError("context", { ...known, ...numbers });
  if (error?.code === "shutting_down") return new ApiError("network", known);
  return new ApiError(KINDS[status] ?? (status >= 500 ? "server" : "request"), known);
}

async function call(path, options) {
  const headers = { ...options.headers };
  if (/[^\x21-\x7e]/.test(apiKey.value)) throw new ApiError("key"); // fetch would refuse it as a header
  if (apiKey.value) headers.Authorization = `Bearer ${apiKey.value}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network", { detail: "" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw errorFrom(response.status, response.headers, body?.error);
}

/** The models the server has: [{ id, context_length?, ... }]. */
export async function listModels(signal) {
  const response = await call("/v1/models", { signal });
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ApiError("server", { status: response.status });
  return body.data.filter((model) => typeof model?.id === "string");
}

/** The `data:` payloads of a server-sent event stream, in order. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a trailing CR may be half of a CRLF
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early closes the connection: the server stops computing
  }
}

/** Stream a chat completion. Yields { text, reasoning } for each piece, { finish } at its end and { usage } when told.
 * Throws ApiError("interrupted") when the connection ends before the answer does. */
export async function* streamChat(body, signal) {
  const response = await call("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorFrom(Number(chunk.error.status) || 500, null, chunk.error);
      const choice = chunk.choices?.[0];
      const text = choice?.delta?.content ?? "";
      const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      if (text || reasoning) yield { text, reasoning };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("interrupted"); // the network broke, or the server sent something that is no JSON
  }
  if (!finished) throw new ApiError("interrupted");
}
