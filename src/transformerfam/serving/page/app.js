// The page of `fam serve`: memories on the left, the chosen one on the right.

import { html, nothing } from "./lit/lit-html.js";
import { ask, Failure, hasKey, keepKey } from "./api.js";
import { chosen } from "./chosen.js";
import { bytes } from "./format.js";
import { list, newMemory, takeFiles } from "./memories.js";
import { keepFresh, pause, refresh, select } from "./reading.js";
import { memoryOf, start, state, update } from "./store.js";

const AGAIN_SECONDS = 2;

async function connect() {
  for (;;) {
    try {
      const { data } = await ask("v1/models");
      update({ facts: data[0], needsKey: false, keyFailure: "", isOnline: true, failure: "" });
      await refresh();
      const wanted = location.hash.slice(1);
      if (!state.selected) select(memoryOf(wanted) ? wanted : (state.memories[0]?.id ?? null));
      return;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      if (error.status === 401) {
        update({ needsKey: true, keyFailure: hasKey() ? error.message : "" });
        return;
      }
      update({ isOnline: false });
      await pause(AGAIN_SECONDS);
    }
  }
}

function enter(event) {
  event.preventDefault();
  keepKey(event.target.elements.key.value.trim());
  connect();
}

const keyForm = () => html`
  <main class="alone">
    <h1>transformerfam</h1>
    <form id="key-form" @submit=${enter}>
      <p>This server asks for an API key. The page keeps it until you close the tab.</p>
      <label>API key <input name="key" type="password" autocomplete="off" required autofocus></label>
      ${state.keyFailure ? html`<p class="failure" role="alert">${state.keyFailure}</p>` : nothing}
      <button class="main">Enter</button>
    </form>
  </main>
`;

const header = () => html`
  <header>
    <h1>transformerfam</h1>
    <p class="quiet">
      ${state.facts.id} &middot; a state of ${bytes(state.facts.memory.state_bytes)}, whatever it reads
    </p>
    ${hasKey() ? html`<button class="plain" @click=${leave}>Forget the key</button>` : nothing}
  </header>
`;

function leave() {
  keepKey(null);
  location.reload();
}

const away = () =>
  state.isOnline ? nothing : html`<p class="away" role="alert">The server does not answer. Trying again ...</p>`;

const empty = () => html`
  <div class="empty">
    <h2>A whole book in ${bytes(state.facts.memory.state_bytes)}</h2>
    <p>
      Drop a text, and watch it being read into a state of constant size. Then ask it, as often as you like, fork it, and
      see which tokens it looked at.
    </p>
  </div>
`;

function view() {
  if (state.needsKey) return keyForm();
  if (!state.facts) return html`<main class="alone">${away()}<p class="quiet" role="status">Connecting ...</p></main>`;
  const memory = state.selected && memoryOf(state.selected);
  return html`
    ${header()} ${away()}
    ${state.failure
      ? html`<p class="failure banner" role="alert">
          <span>${state.failure}</span>
          <button class="plain" @click=${() => update({ failure: "" })}>Dismiss</button>
        </p>`
      : nothing}
    <main>
      <section class="left" aria-label="Memories">${newMemory()}<h2>Memories</h2>${list()}</section>
      <div class="right">${memory ? chosen(memory) : empty()}</div>
    </main>
    <p class="unseen" role="status">${state.said}</p>
  `;
}

function dragged(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault(); // else the browser would open the file
  const isOver = event.type === "dragover";
  if (state.isDraggedOver !== isOver) update({ isDraggedOver: isOver });
  if (event.type === "drop" && state.facts && !state.needsKey) takeFiles(event.dataTransfer.files);
}

for (const kind of ["dragover", "dragleave", "drop"]) window.addEventListener(kind, dragged);

function measure() {
  const right = document.querySelector(".right");
  if (right && right.clientWidth !== state.width) update({ width: right.clientWidth });
}

start(view, document.getElementById("app"));
new ResizeObserver(measure).observe(document.getElementById("app"));
connect().then(measure);
new MutationObserver(measure).observe(document.getElementById("app"), { childList: true });
keepFresh();
