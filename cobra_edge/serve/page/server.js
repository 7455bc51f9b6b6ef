// The client of the server's API, and its error messages.

import { events } from "./events.js";

/** A failed request: title, explanation, and when to retry. */
export class Failure extends Error {
  constructor(title, words, { status = 0, retrySeconds = null } = {}) {
    super(words);
    Object.assign(this, { title, words, status, retrySeconds });
  }
}

const TITLES = {
  400: "The server rejected the request",
  401: "The server requires an API key",
  403: "Not allowed",
  404: "Unknown model",
  408: "The request took too long to arrive",
  413: "The request is too large",
  429: "The server is busy",
  503: "The server is not ready",
  504: "The answer took too long",
};

/** Return the models of the server, [{id}, ...]. Throws Failure. */
export async function models(key) {
  const response = await request("v1/models", { headers: authorisation(key) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data) || data.length === 0) throw new Failure("The server has no model", "Its list of models is empty.");
  return data;
}

/**
 * Send a request and yield the chunks {text, finish, usage, extension}; missing values are "" or null.
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
    throw new Failure("The connection was lost", "The answer is incomplete.");
  }
  throw new Failure("The answer is incomplete", "The server closed the connection before the end.");
}

function piece(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Failure("Invalid answer", "The server sent something that is not JSON.");
  }
  if (chunk.error) throw new Failure("The answer was aborted", chunk.error.message ?? "The server gives no reason.");
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
    throw new Failure("The server cannot be reached", "It may have been stopped, or the network is down.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({})); // an error of a proxy is not JSON
  const words = error?.message ?? `Status ${response.status} without an explanation.`;
  const retrySeconds = secondsUntil(response.headers.get("Retry-After"));
  throw new Failure(TITLES[response.status] ?? "The server failed", words, { status: response.status, retrySeconds });
}

/** Return the seconds of a Retry-After header, which has a number or a date; null for none. */
function secondsUntil(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

function authorisation(key) {
  const bytes = new TextEncoder().encode(key); // UTF-8 bytes, which fetch takes as characters below 256
  return key ? { Authorization: `Bearer ${String.fromCharCode(...bytes)}` } : {};
}
