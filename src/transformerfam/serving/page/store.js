// What the page knows, and the drawing of it again after each change.

import { render } from "./lit/lit-html.js";

export const state = {
  facts: null, // of /v1/models; null: not known yet
  needsKey: false,
  keyFailure: "",
  memories: [],
  selected: null, // id
  isOnline: true,
  failure: "", // of the last thing that was done
  said: "", // for screen readers
  sending: "", // name of the text that is on its way
  isDraggedOver: false,
  readings: {}, // by id: what is known of how fast a text is read
  talks: {}, // by id: questions and answers of this visit
  looks: {}, // by id: where the memory looked
  width: 640, // pixels of the right column
};

let view = null;
let root = null;
let isAsked = false;

export function start(drawn, element) {
  view = drawn;
  root = element;
  update();
}

export function update(changes = {}) {
  Object.assign(state, changes);
  if (isAsked) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    render(view(), root);
  });
}

export function memoryOf(id) {
  return state.memories.find((memory) => memory.id === id);
}

export function put(memory) {
  const known = memoryOf(memory.id);
  const memories = known
    ? state.memories.map((other) => (other.id === memory.id ? memory : other))
    : [memory, ...state.memories];
  update({ memories });
}
