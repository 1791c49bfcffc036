// The right column: one memory, how it was read, and what can be done with it.

import { html, nothing } from "./lit/lit-html.js";
import { keyed } from "./lit/directives/keyed.js";
import { ask, path, send } from "./api.js";
import { asking } from "./asking.js";
import { cacheBytes, memoryChart } from "./chart.js";
import * as dialogs from "./dialogs.js";
import { bytes, nameOf, whole } from "./format.js";
import { looking } from "./looking.js";
import { append, attempt, select } from "./reading.js";
import { put, state, update } from "./store.js";

async function rename(memory) {
  const name = await dialogs.put({ title: "Rename", label: "Name", value: memory.name ?? "", action: "Rename" });
  if (name === null) return;
  await attempt(async () => put(await ask(path(memory.id), { method: "PATCH", json: { name: name || null } })));
}

async function fork(memory) {
  const text = "The fork has read what this memory has; from then on they are two.";
  const value = `${nameOf(memory)}, fork`.slice(0, 200);
  const name = await dialogs.put({ title: "Fork", text, label: "Name", value, action: "Fork" });
  if (name === null) return;
  await attempt(async () => {
    const made = await ask(path(memory.id, "/fork"), { method: "POST", json: { name: name || null } });
    put(made);
    select(made.id);
    update({ said: `${nameOf(made)} is made` });
  });
}

async function remove(memory) {
  const text = `"${nameOf(memory)}" and what it has read are removed from the server. Nobody can bring them back.`;
  if (!(await dialogs.put({ title: "Delete this memory?", text, action: "Delete", isDanger: true }))) return;
  await attempt(async () => {
    await ask(path(memory.id), { method: "DELETE" });
    update({
      memories: state.memories.filter((other) => other.id !== memory.id),
      said: `${nameOf(memory)} is deleted`,
    });
    state.looks[memory.id]?.open?.abort();
    state.talks[memory.id]?.open?.abort();
    select(null);
  });
}

async function download(memory) {
  await attempt(async () => {
    const blob = await (await send(path(memory.id, "/state"))).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${memory.id}.fam.safetensors`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

async function more(event, memory) {
  event.preventDefault();
  const { more: text } = event.target.elements;
  if (!text.value.trim()) return text.focus();
  if (await append(memory.id, text.value)) text.value = "";
}

const number = (label, value) => html`<div><dt>${label}</dt><dd>${value}</dd></div>`;

function reading(memory) {
  const seen = state.readings[memory.id];
  const { facts } = state;
  const isReading = memory.status === "reading";
  return html`
    <section aria-labelledby="read-title" aria-busy=${isReading ? "true" : "false"}>
      <h3 id="read-title">${isReading ? "Reading" : "Read"}</h3>
      <dl class="numbers-row">
        ${number("tokens", whole(memory.num_tokens_read))} ${seen ? number("tokens per second", seen.rate ? whole(seen.rate) : "\u2013") : nothing}
        ${number("state in RAM", bytes(facts.memory.state_bytes))}
        ${number("key/value cache", bytes(cacheBytes(facts, memory.num_tokens_read)))}
      </dl>
      ${memoryChart(facts, memory.num_tokens_read, state.width)}
      ${memory.error ? html`<p class="failure" role="alert">${memory.error}</p>` : nothing}
      ${memory.unknown_tokens
        ? html`<p class="quiet">${whole(memory.unknown_tokens)} of its tokens are words that the model does not know.</p>`
        : nothing}
    </section>
  `;
}

function actions(memory) {
  const isReady = memory.status !== "reading";
  return html`
    <div class="row actions">
      <button class="plain" @click=${() => rename(memory)}>Rename</button>
      <button class="plain" ?disabled=${!isReady} @click=${() => fork(memory)}>Fork</button>
      <button class="plain" ?disabled=${!isReady} @click=${() => download(memory)}>Download</button>
      <button class="plain danger-text" @click=${() => remove(memory)}>Delete</button>
    </div>
  `;
}

function appending(memory) {
  const isReady = memory.status !== "reading";
  const takeFile = async (event) => {
    const [file] = event.target.files;
    if (file) await append(memory.id, file);
    event.target.value = "";
  };
  return html`
    <section aria-labelledby="more-title">
      <h3 id="more-title">Read more into it</h3>
      <form id="more" @submit=${(event) => more(event, memory)}>
        <label>Text <textarea name="more" rows="3"></textarea></label>
        <div class="row">
          <button class="plain" ?disabled=${!isReady}>Append</button>
          <label class="button">
            <input type="file" class="unseen" ?disabled=${!isReady} @change=${takeFile}> Append a file
          </label>
        </div>
      </form>
    </section>
  `;
}

export function chosen(memory) {
  const when = new Date(1000 * memory.created).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
  return keyed(
    memory.id,
    html`
      <h2 id="chosen" tabindex="-1">${nameOf(memory)}</h2>
      <p class="quiet"><code>${memory.id}</code> &middot; ${when} &middot; ${bytes(memory.bytes)} in the store</p>
      ${actions(memory)} ${reading(memory)} ${asking(memory)} ${looking(memory)} ${appending(memory)}
    `,
  );
}
