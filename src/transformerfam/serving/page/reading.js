// Texts on their way into memories, and how fast they are read.

import { ask, events, Failure, path, send } from "./api.js";
import { nameOf, plural } from "./format.js";
import { memoryOf, put, state, update } from "./store.js";

const RATE_SECONDS = 4; // over which tokens per second are counted
const AGAIN_SECONDS = 1;
const POLL_SECONDS = { reading: 2, ready: 10 };

export const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// Do something, and say in words why it failed; return whether it did not.
export async function attempt(work) {
  update({ failure: "" });
  try {
    await work();
    return true;
  } catch (error) {
    failed(error);
    return false;
  }
}

export function failed(error) {
  if (!(error instanceof Failure)) throw error;
  if (error.status === 401) {
    update({ needsKey: true, keyFailure: state.facts ? error.message : "" });
    return;
  }
  update({ failure: error.message });
}

export function select(id) {
  update({ selected: id });
  history.replaceState(null, "", id ? `#${id}` : location.pathname + location.search);
}

export async function refresh() {
  const { data } = await ask("v1/memories?limit=1000");
  const isGone = state.selected && !data.some((memory) => memory.id === state.selected);
  update({ memories: data, isOnline: true });
  if (isGone) select(null);
  data.filter((memory) => memory.status === "reading").forEach((memory) => watch(memory.id));
}

// Keep the list fresh; while the server is away say so, and try again.
export async function keepFresh() {
  for (;;) {
    const reads = state.memories.some((memory) => memory.status === "reading");
    await pause(!state.isOnline || reads ? POLL_SECONDS.reading : POLL_SECONDS.ready);
    if (document.hidden || state.needsKey || !state.facts) continue;
    try {
      await refresh();
    } catch (error) {
      if (error.status === 401) failed(error);
      else update({ isOnline: false });
    }
  }
}

// Make a memory of a text or of a state's file: a File, or what was pasted.
export async function make(content, name, keepsText) {
  const isState = content instanceof File && content.name.endsWith(".safetensors");
  const query = new URLSearchParams();
  if (name) query.set("name", name.slice(0, 200));
  if (keepsText && !isState) query.set("keep_text", "true");
  update({ sending: name || "the text" });
  const isMade = await attempt(async () => {
    const made = await ask(`v1/memories${isState ? "/state" : ""}?${query}`, { method: "POST", text: content });
    put(made);
    select(made.id);
    watch(made.id);
  });
  update({ sending: "" });
  return isMade;
}

export async function makeOfFiles(files, name, keepsText) {
  for (const file of files) {
    const ownName = file.name.replace(/\.(fam\.safetensors|[^.]+)$/, "");
    if (!(await make(file, files.length === 1 && name ? name : ownName, keepsText))) return false;
  }
  return true;
}

export function append(id, content) {
  return attempt(async () => {
    put(await ask(path(id, "/append"), { method: "POST", text: content }));
    watch(id);
  });
}

// Follow a reading until it is over.
export async function watch(id) {
  if (state.readings[id]?.isOpen || memoryOf(id)?.status !== "reading") return;
  const reading = { isOpen: true, samples: [], rate: 0, first: null };
  state.readings[id] = reading;
  try {
    while (memoryOf(id)?.status === "reading") {
      try {
        for await (const memory of events(await send(path(id, "/progress")))) note(reading, memory);
      } catch (error) {
        if (error.code === "memory_not_found" || error.status === 401) return;
        update({ isOnline: false });
      }
      if (memoryOf(id)?.status === "reading") await pause(AGAIN_SECONDS);
    }
  } finally {
    reading.isOpen = false;
    update();
  }
}

function note(reading, memory) {
  const now = performance.now() / 1000;
  const sample = { now, tokens: memory.num_tokens_read };
  reading.first ??= sample;
  reading.samples = [...reading.samples.filter((old) => old.now > now - RATE_SECONDS), sample];
  const since = memory.status === "reading" ? reading.samples[0] : reading.first; // at last the mean of all
  if (now > since.now && sample.tokens > since.tokens) {
    reading.rate = (sample.tokens - since.tokens) / (now - since.now);
  }
  put(memory);
  if (!state.isOnline) update({ isOnline: true });
  if (memory.status === "ready") update({ said: `${nameOf(memory)} is read: ${plural(sample.tokens, "token")}` });
  if (memory.status === "failed") update({ said: `${nameOf(memory)} was not read` });
}
