// Requests to the server. The API key stays in this tab, and ends with it.

const KEY = "transformerfam-key";

export class Failure extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

async function failureOf(response) {
  try {
    const { error } = await response.json();
    return new Failure(error.message, response.status, error.code);
  } catch {
    return new Failure(`the server answered with status ${response.status} and no reason`, response.status);
  }
}

// Send a request and return the response, whose status is good. Paths are relative, so that a proxy may add to them.
export async function send(path, { method = "GET", json, text, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let body;
  if (json !== undefined) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(json);
  } else if (text !== undefined) {
    headers["Content-Type"] = "text/plain; charset=utf-8";
    body = text;
  }
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server cannot be reached; look whether it is running, and try again", 0, "unreachable");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

export async function ask(path, options) {
  return (await send(path, options)).json();
}

// Yield the server-sent events of a response: objects, and at last "[DONE]" where the server says so.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        const event = data === "[DONE]" ? data : JSON.parse(data);
        if (event.error) throw new Failure(event.error.message, 0, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure("the connection to the server broke off", 0, "broken");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const path = (id, rest = "") => `v1/memories/${encodeURIComponent(id)}${rest}`;
