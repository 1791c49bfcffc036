// Which tokens the memory looked at, block by block: a heat map of each, and the numbers.

import { html, nothing, svg } from "./lit/lit-html.js";
import { events, Failure, path, send } from "./api.js";
import { percent, plural, whole } from "./format.js";
import { state, update } from "./store.js";

const NUM_LEVELS = 10;
const NUM_STRONGEST = 8;
const BARS_HEIGHT = 72;
const ROWS_HEIGHT = 48;
const MEAN = "mean";

const partOf = (block, layer) =>
  layer === MEAN ? block : block.layers.find((part) => String(part.layer) === layer);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const shareOf = (block, layer) => (layer === MEAN ? block.share : sum(partOf(block, layer).weights));

function rowsOf(block, layer) {
  if (layer !== MEAN) return partOf(block, layer).share_of_rows;
  const all = block.layers.map((part) => part.share_of_rows);
  return all[0].map((_, row) => sum(all.map((shares) => shares[row])) / all.length);
}

async function look(event, memory) {
  event.preventDefault();
  const { most, text } = event.target.elements;
  const shown = { blocks: [], at: 0, layer: MEAN, peaks: {}, end: null, why: "", open: new AbortController() };
  state.looks[memory.id] = shown;
  update();
  const json = { num_blocks: Number(most.value), layers: true };
  if (text.value.trim()) json.text = text.value;
  try {
    const response = await send(path(memory.id, "/attention"), { method: "POST", json, signal: shown.open.signal });
    for await (const found of events(response)) {
      if (found.object === "memory.attention.block") add(shown, found);
      else if (found !== "[DONE]") shown.end = found;
      update();
    }
    if (!shown.end) throw new Failure("the server went away before the text was read");
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Failure)) throw error;
    if (error instanceof Failure) shown.why = error.message;
    if (error.status === 401) update({ needsKey: true, keyFailure: error.message });
  } finally {
    shown.open = null;
    update();
  }
}

function add(shown, block) {
  shown.blocks.push(block);
  for (const [layer, part] of [[MEAN, block], ...block.layers.map((part) => [String(part.layer), part])])
    shown.peaks[layer] = Math.max(shown.peaks[layer] ?? 1e-9, ...part.weights);
}

function step(shown, at) {
  shown.at = Math.min(Math.max(at, 0), shown.blocks.length - 1);
  update();
}

const strongestBlock = ({ blocks, layer }) =>
  blocks.reduce((best, block, at) => (shareOf(block, layer) > shareOf(blocks[best], layer) ? at : best), 0);

// Bars as an SVG that is stretched over the column's width: shares from 0 to 1.
function bars(shares, height, classOf) {
  return svg`${shares.map(
    (share, place) => svg`
      <rect class=${classOf(place)} x=${place + 0.08} width="0.84" y=${(1 - share) * height} height=${share * height}></rect>`,
  )}`;
}

function overview(shown) {
  const { blocks, layer, at } = shown;
  const pick = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    step(shown, Math.floor(((event.clientX - box.left) / box.width) * blocks.length));
  };
  const block = blocks[at];
  const said = `block ${whole(block.block)}, ${percent(shareOf(block, layer))} of the rows' attention fell on it`;
  return html`
    <figure class="overview">
      <figcaption>Share of the rows' attention that fell on each block</figcaption>
      <svg aria-hidden="true" preserveAspectRatio="none" height=${BARS_HEIGHT}
        viewBox="0 0 ${Math.max(blocks.length, 16)} ${BARS_HEIGHT}" @click=${pick}>
        ${bars(blocks.map((one) => shareOf(one, layer)), BARS_HEIGHT, (place) => (place === at ? "bar now" : "bar"))}
      </svg>
      <label for="block">Block</label>
      <div class="row steps">
        <button type="button" class="plain" ?disabled=${at === 0} @click=${() => step(shown, at - 1)}>Previous</button>
        <input id="block" type="range" min="0" max=${blocks.length - 1} .value=${String(at)} aria-valuetext=${said}
          @input=${(event) => step(shown, event.target.valueAsNumber)}>
        <button type="button" class="plain" ?disabled=${at === blocks.length - 1}
          @click=${() => step(shown, at + 1)}>Next</button>
        <button type="button" class="plain" @click=${() => step(shown, strongestBlock(shown))}>Strongest</button>
      </div>
    </figure>
  `;
}

function token(text, weight, peak) {
  if (text === null) return html`<span class="before" title="read before">&hellip;</span>`;
  const level = Math.round(NUM_LEVELS * Math.sqrt(Math.min(weight / peak, 1)));
  return html`<span class="heat-${level}" title=${percent(weight)}>${text || "\u00b7"}</span>`;
}

// A token in a table: without the space in front of it, and white space by name.
function named(text) {
  if (text === null) return "read before";
  if (text === "") return "\u00b7";
  return text.trim() || (text.includes("\n") ? "line end" : "space");
}

function strongest(block, layer) {
  const { weights } = partOf(block, layer);
  return weights
    .map((weight, place) => ({ weight, place: block.first_token + place, text: block.tokens[place] }))
    .sort((a, b) => b.weight - a.weight)
    .slice(0, NUM_STRONGEST);
}

function blockView(shown) {
  const { layer } = shown;
  const block = shown.blocks[shown.at];
  const { weights } = partOf(block, layer);
  const rows = rowsOf(block, layer);
  const last = block.first_token + block.tokens.length - 1;
  const saidRows = rows.map((share, row) => `row ${row} ${percent(share)}`).join(", ");
  return html`
    <p class="caption" aria-live="polite">
      Block ${whole(block.block)}, tokens ${whole(block.first_token)} to ${whole(last)}:
      <b>${percent(shareOf(block, layer))}</b> of the rows' attention fell on it, the rest on what they already held.
    </p>
    <p class="tokens" tabindex="0" role="group" aria-label="Tokens of block ${block.block}">${weights.map(
      (weight, place) => token(block.tokens[place], weight, shown.peaks[layer]),
    )}</p>
    <div class="halves">
      <table>
        <caption>Most attention</caption>
        <thead><tr><th scope="col">Token</th><th scope="col" class="number">Place</th>
          <th scope="col" class="number">Attention</th></tr></thead>
        <tbody>${strongest(block, layer).map(
          ({ text, place, weight }) => html`
            <tr><td><code>${named(text)}</code></td><td class="number">${whole(place)}</td>
              <td class="number">${percent(weight)}</td></tr>`,
        )}</tbody>
      </table>
      <figure>
        <figcaption>What each row wrote of the block</figcaption>
        <svg class="rows" preserveAspectRatio="none" height=${ROWS_HEIGHT} viewBox="0 0 ${rows.length} ${ROWS_HEIGHT}"
          role="img" aria-label=${saidRows}>${bars(rows, ROWS_HEIGHT, () => "bar now")}</svg>
        <p class="quiet">${plural(rows.length, "row")}; full height is all of a row's attention.</p>
      </figure>
    </div>
  `;
}

function choice(shown) {
  const layers = shown.blocks[0].layers.map((part) => String(part.layer));
  const pick = (event) => {
    shown.layer = event.target.value;
    update();
  };
  return html`
    <label class="inline">Layer
      <select @change=${pick}>
        <option value=${MEAN} ?selected=${shown.layer === MEAN}>mean of all</option>
        ${layers.map((layer) => html`<option value=${layer} ?selected=${shown.layer === layer}>${layer}</option>`)}
      </select>
    </label>
  `;
}

function shownView(shown) {
  if (shown.why) return html`<p class="failure" role="alert">${shown.why}</p>`;
  if (!shown.blocks.length) {
    if (shown.open) return html`<p class="quiet" role="status">Reading ...</p>`;
    const size = state.facts.memory.block_size;
    return html`<p class="quiet">The text fills no block of ${plural(size, "token")}, so no row has looked at it yet.</p>`;
  }
  return html`
    <div class="row">
      ${choice(shown)}
      <span class="quiet" role="status">${plural(shown.blocks.length, "block")}${shown.open ? " so far" : ""}</span>
    </div>
    ${overview(shown)} ${blockView(shown)}
    <p class="quiet">
      Attention is the mean over heads and FAM rows. A token's colour is the square root of it, against the strongest
      token of all blocks shown.
    </p>
  `;
}

export function looking(memory) {
  const shown = state.looks[memory.id];
  const isKept = memory.keep_text;
  return html`
    <section aria-labelledby="look-title">
      <h3 id="look-title">Where it looked</h3>
      <p class="quiet">
        ${isKept
          ? "The text is read again, to see which of its tokens the memory's rows attend to. The memory does not change."
          : "The text of this memory was not kept. Give one, to see what the memory would look at in it; it does not change."}
      </p>
      <form id="look" @submit=${(event) => look(event, memory)}>
        <details ?open=${!isKept}>
          <summary>${isKept ? "Look at another text" : "Text"}</summary>
          <label>Text that would follow <textarea name="text" rows="3" ?required=${!isKept}></textarea></label>
        </details>
        <div class="row">
          ${shown?.open
            ? html`<button type="button" class="plain" @click=${() => shown.open.abort()}>Stop</button>`
            : html`<button class="plain" ?disabled=${memory.status === "reading"}>Show</button>`}
          <label class="inline">Blocks at most
            <select name="most">
              ${[64, 256, 1024, 100000].map(
                (most) => html`<option value=${most}>${most === 100000 ? "all" : whole(most)}</option>`,
              )}
            </select>
          </label>
        </div>
      </form>
      ${shown ? shownView(shown) : nothing}
    </section>
  `;
}
