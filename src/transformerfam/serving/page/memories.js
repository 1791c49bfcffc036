// The left column: a new memory, and the list of all.

import { html, nothing } from "./lit/lit-html.js";
import { repeat } from "./lit/directives/repeat.js";
import { bytes, nameOf, plural } from "./format.js";
import { make, makeOfFiles, select } from "./reading.js";
import { state, update } from "./store.js";

const form = () => document.getElementById("new-memory").elements;

export async function takeFiles(files) {
  if (files.length && !state.sending && (await makeOfFiles([...files], form().name.value.trim(), form().keeps.checked)))
    form().name.value = "";
}

async function takePasted(event) {
  event.preventDefault();
  const { name, keeps, pasted } = form();
  if (!pasted.value.trim()) return pasted.focus();
  if (await make(pasted.value, name.value.trim(), keeps.checked)) {
    name.value = "";
    pasted.value = "";
  }
}

function takeChosen(event) {
  takeFiles(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
}

export function newMemory() {
  return html`
    <form id="new-memory" @submit=${takePasted}>
      <div class="drop ${state.isDraggedOver ? "over" : ""}">
        <p><b>Drop a book here</b>, or any text</p>
        <label class="button">
          <input type="file" class="unseen" id="file" multiple ?disabled=${state.sending} @change=${takeChosen}>
          Choose a file
        </label>
        ${state.sending ? html`<p class="quiet" role="status">Sending ${state.sending} ...</p>` : nothing}
      </div>
      <label>Name <input name="name" maxlength="200" autocomplete="off" placeholder="the file's name"></label>
      <label class="check">
        <input type="checkbox" name="keeps" checked>
        <span>Keep the text on the server, to see later where the memory looked</span>
      </label>
      <details>
        <summary>Paste a text</summary>
        <label>Text <textarea name="pasted" rows="5"></textarea></label>
        <button class="main" ?disabled=${state.sending}>Read it</button>
      </details>
    </form>
  `;
}

function entry(memory) {
  const isChosen = memory.id === state.selected;
  const what = { reading: "reading", failed: "failed" }[memory.status];
  return html`
    <li>
      <button class="entry" aria-current=${isChosen ? "true" : "false"} @click=${() => choose(memory.id)}>
        <span class="name">${nameOf(memory)}</span>
        <span class="numbers">
          <span>${plural(memory.num_tokens_read, "token")}</span>
          <span>${what ? html`<em class=${what}>${what}</em>` : bytes(memory.bytes)}</span>
        </span>
      </button>
    </li>
  `;
}

function choose(id) {
  select(id);
  if (matchMedia("(width < 52rem)").matches)
    requestAnimationFrame(() => requestAnimationFrame(() => document.getElementById("chosen")?.focus()));
  update({ failure: "" });
}

export function list() {
  if (!state.memories.length) return html`<p class="quiet">No memories yet.</p>`;
  return html`<ul class="list">${repeat(state.memories, (memory) => memory.id, entry)}</ul>`;
}
