// Questions to a memory, and answers as they come.

import { html, nothing } from "./lit/lit-html.js";
import { ask, events, Failure, path, send } from "./api.js";
import { plural } from "./format.js";
import { attempt } from "./reading.js";
import { put, state, update } from "./store.js";

const talkOf = (id) => (state.talks[id] ??= { turns: [], open: null });

function bodyOf(memory, question, keeps, maxTokens, temperature) {
  const shared = {
    model: state.facts.id,
    memory: memory.id,
    memory_update: keeps,
    max_tokens: maxTokens,
    temperature,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (state.facts.has_chat) return ["v1/chat/completions", { ...shared, messages: [{ role: "user", content: question }] }];
  const gap = memory.num_tokens_read && !/^\s/.test(question) ? " " : ""; // between what was read and the question
  return ["v1/completions", { ...shared, prompt: gap + question }];
}

async function sendQuestion(event, memory) {
  event.preventDefault();
  const { question, keeps, most, temperature } = event.target.elements;
  const talk = talkOf(memory.id);
  if (!question.value.trim()) return question.focus();
  if (talk.open) return;
  const turn = { question: question.value, answer: "", state: "open", keeps: keeps.checked, usage: null, why: "" };
  const [where, json] = bodyOf(memory, turn.question, turn.keeps, most.valueAsNumber, temperature.valueAsNumber);
  talk.turns.push(turn);
  talk.open = new AbortController();
  question.value = "";
  update();
  const began = performance.now();
  try {
    const response = await send(where, { method: "POST", json, signal: talk.open.signal });
    await take(turn, response, began);
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Failure)) throw error;
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    turn.why = error.message;
    if (error.status === 401) update({ needsKey: true, keyFailure: error.message });
  } finally {
    talk.open = null;
    update();
  }
  if (turn.keeps && turn.state === "done") await attempt(async () => put(await ask(path(memory.id))));
}

async function take(turn, response, began) {
  for await (const event of events(response)) {
    turn.seconds = (performance.now() - began) / 1000;
    if (event === "[DONE]") turn.state = "done";
    else {
      const [choice] = event.choices;
      turn.answer += choice?.text ?? choice?.delta?.content ?? "";
      turn.usage = event.usage ?? turn.usage;
      turn.reason = choice?.finish_reason ?? turn.reason;
    }
    update();
  }
  if (turn.state !== "done") throw new Failure("the server went away before the answer was complete");
}

function afterword(turn) {
  const memory = turn.keeps ? "The memory has read question and answer." : "The memory is as it was.";
  if (turn.state === "open") return nothing;
  if (turn.state === "stopped") return html`<p class="quiet">Stopped. The memory is as it was.</p>`;
  if (turn.state === "failed") return html`<p class="failure" role="alert">No whole answer: ${turn.why}</p>`;
  const { completion_tokens: made, unknown_tokens: unknown } = turn.usage ?? {};
  return html`
    <p class="quiet">
      ${made ? html`${plural(made, "token")} in ${turn.seconds.toFixed(1)}&nbsp;s. ` : nothing}${memory}
      ${turn.reason === "length" ? "The answer ended at its longest length." : nothing}
      ${unknown ? html`${plural(unknown, "word")} of the question the model does not know.` : nothing}
    </p>
  `;
}

const turnView = (turn) => html`
  <div>
    <p class="question">${turn.question}</p>
    <p class="answer">${turn.answer}${turn.state === "open" ? html`<span class="caret" aria-hidden="true"></span>` : nothing}</p>
    ${afterword(turn)}
  </div>
`;

function sendAtEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

export function asking(memory) {
  const talk = talkOf(memory.id);
  const isChat = state.facts.has_chat;
  const isReadable = memory.status !== "reading";
  return html`
    <section aria-labelledby="ask-title">
      <h3 id="ask-title">Ask</h3>
      <div class="talk" role="log" aria-live="polite" aria-busy=${talk.open ? "true" : "false"} aria-label="Answers">
        ${talk.turns.map(turnView)}
      </div>
      <form id="ask" @submit=${(event) => sendQuestion(event, memory)}>
        <label for="question">${isChat ? "Question" : "Text to continue"}</label>
        <textarea id="question" name="question" rows="2" aria-describedby="question-hint"
          @keydown=${sendAtEnter}></textarea>
        <p class="quiet hint" id="question-hint">
          ${isChat
            ? "Enter sends, Shift+Enter begins a line. Unless the memory keeps turns, each question is asked alone."
            : 'The model has no chat template and continues your text. End it where the answer begins: "... The pass key is".'}
        </p>
        <div class="row">
          ${talk.open
            ? html`<button type="button" class="main" @click=${() => talk.open.abort()}>Stop</button>`
            : html`<button class="main" ?disabled=${!isReadable}>Ask</button>`}
          <label class="check"><input type="checkbox" name="keeps"> <span>The memory keeps the turn</span></label>
          <label class="inline">Tokens at most
            <input name="most" type="number" min="1" max=${state.facts.max_tokens} required
              value=${Math.min(isChat ? 256 : 16, state.facts.max_tokens)}>
          </label>
          <label class="inline">Temperature
            <input name="temperature" type="number" min="0" max="2" step="0.1" value="0" required>
          </label>
        </div>
      </form>
    </section>
  `;
}
