// What this page asks of its server, and what it says where it gets no answer.

import { events } from "./events.js";

/** Why there is no answer: a title and an explanation for people, and when it may be worth asking again. */
export class Failure extends Error {
  constructor(title, words, { status = 0, retrySeconds = null } = {}) {
    super(words);
    Object.assign(this, { title, words, status, retrySeconds });
  }
}

const TITLES = {
  400: "The server does not take this question",
  401: "The server asks for a key",
  403: "The server does not allow this",
  404: "The server does not know this model",
  408: "The question took too long to arrive",
  413: "This is too large for the server",
  429: "The server is busy",
  503: "The server is not ready",
  504: "The answer took too long",
};

/** Return the server's models, [{id}, ...]. Throws Failure. */
export async function models(key) {
  const response = await request("v1/models", { headers: authorisation(key) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data) || data.length === 0) throw new Failure("The server names no model", "Its list of models is empty.");
  return data;
}

/**
 * Ask, and yield what comes: {text, finish, usage, extension}, each where a chunk has it, else "" or null.
 * Throws Failure, or the AbortError of `signal`.
 */
export async function* answer({ body, key, signal }) {
  const headers = { ...authorisation(key), "Content-Type": "application/json" };
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(streamed), signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      yield piece(data);
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure("The connection broke", "What had come by then is kept above.");
  }
  throw new Failure("The answer ends in the middle", "The server closed the connection before it had said all.");
}

function piece(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Failure("The answer cannot be read", "The server sent something that is not JSON.");
  }
  if (chunk.error) throw new Failure("The answer was broken off", chunk.error.message ?? "The server does not say why.");
  const choice = chunk.choices?.[0];
  return {
    text: choice?.delta?.content ?? "",
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
    extension: chunk.cobra_edge ?? null,
  };
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached", "It may have been stopped, or the network is gone.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({})); // a proxy in between speaks no JSON
  const words = error?.message ?? `It answered with status ${response.status} and no explanation.`;
  const retrySeconds = secondsUntil(response.headers.get("Retry-After"));
  throw new Failure(TITLES[response.status] ?? "The server failed", words, { status: response.status, retrySeconds });
}

/** Return the seconds of a Retry-After header, which gives them or a date; null for none. */
function secondsUntil(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

function authorisation(key) {
  const bytes = new TextEncoder().encode(key); // headers carry bytes, which fetch takes as characters below 256
  return key ? { Authorization: `Bearer ${String.fromCharCode(...bytes)}` } : {};
}
