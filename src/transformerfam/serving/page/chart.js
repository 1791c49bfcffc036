// The bytes of a state, which stay, beside those of a key/value cache, which grow with every token.

import { html, svg } from "./lit/lit-html.js";
import { bytes, niceAbove, roundBytes, whole } from "./format.js";

const HEIGHT = 190;
const EDGE = { top: 10, right: 12, bottom: 26, left: 64 };
const NUM_POINTS = 80;

// Bytes of the base model's key/value cache of so many tokens; layers with a window keep no more than that.
export function cacheBytes(facts, numTokens) {
  return facts.kv_cache.reduce(
    (sum, { window, bytes_per_token: width }) => sum + width * Math.min(numTokens, window ?? Infinity),
    0,
  );
}

export function memoryChart(facts, numTokens, width) {
  const held = facts.memory.state_bytes;
  const most = Math.max(niceAbove(numTokens), facts.memory.block_size);
  const top = niceAbove(Math.max(cacheBytes(facts, most), held) * 1.02);
  const right = Math.max(width - EDGE.right, EDGE.left + 80);
  const x = (tokens) => EDGE.left + ((right - EDGE.left) * tokens) / most;
  const y = (size) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.bottom - EDGE.top) * size) / top;
  const points = Array.from({ length: NUM_POINTS + 1 }, (_, i) => (numTokens * i) / NUM_POINTS)
    .map((tokens) => `${x(tokens).toFixed(1)},${y(cacheBytes(facts, tokens)).toFixed(1)}`)
    .join(" ");
  const cache = cacheBytes(facts, numTokens);
  const said =
    `State: ${bytes(held)} at every length. A key/value cache of the same model would take ${bytes(cache)} ` +
    `after ${whole(numTokens)} tokens.`;
  const lines = [0, top / 2, top];
  const ends = [
    { tokens: 0, anchor: "start", text: "0" },
    { tokens: most, anchor: "end", text: `${whole(most)} tokens` },
  ];
  return html`
    <figure class="chart">
      <figcaption>
        <span><i class="swatch state"></i>state <b>${bytes(held)}</b></span>
        <span><i class="swatch cache"></i>key/value cache without a memory <b>${bytes(cache)}</b></span>
      </figcaption>
      <svg width=${width} height=${HEIGHT} viewBox="0 0 ${width} ${HEIGHT}" role="img" aria-label=${said}>
        ${lines.map(
          (size) => svg`
            <line class="grid" x1=${EDGE.left} x2=${right} y1=${y(size)} y2=${y(size)}></line>
            <text x=${EDGE.left - 8} y=${y(size) + 4} text-anchor="end">${roundBytes(size)}</text>`,
        )}
        ${ends.map(
          ({ tokens, anchor, text }) => svg`
            <text x=${x(tokens)} y=${HEIGHT - 8} text-anchor=${anchor}>${text}</text>`,
        )}
        <polyline class="cache" points=${points}></polyline>
        <line class="state" x1=${x(0)} x2=${x(numTokens)} y1=${y(held)} y2=${y(held)}></line>
        <circle class="cache" r="4" cx=${x(numTokens)} cy=${y(cache)}></circle>
        <circle class="state" r="4" cx=${x(numTokens)} cy=${y(held)}></circle>
      </svg>
    </figure>
  `;
}
