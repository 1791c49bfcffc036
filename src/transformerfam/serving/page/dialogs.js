// A question in front of the page: a name, or yes or no.

import { html, nothing, render } from "./lit/lit-html.js";

// Return what was typed ("" included), true where nothing was to be typed, or null for "Cancel".
export function put({ title, text = "", label = null, value = "", action, isDanger = false }) {
  return new Promise((resolve) => {
    const dialog = document.createElement("dialog");
    let answer = null;
    const submit = (event) => {
      event.preventDefault();
      answer = label === null ? true : event.target.elements.value.value.trim();
      dialog.close();
    };
    dialog.setAttribute("aria-labelledby", "dialog-title");
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    render(
      html`
        <form @submit=${submit}>
          <h2 id="dialog-title">${title}</h2>
          ${text ? html`<p>${text}</p>` : nothing}
          ${label === null
            ? nothing
            : html`<label>${label}<input name="value" maxlength="200" autocomplete="off" .value=${value}></label>`}
          <div class="row end">
            <button type="button" class="plain" @click=${() => dialog.close()}>Cancel</button>
            <button class=${isDanger ? "danger" : "main"}>${action}</button>
          </div>
        </form>
      `,
      dialog,
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}
