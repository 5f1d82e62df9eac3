// Small helpers for the document. Text always goes in as text: nothing here parses markup.

export const byId = (id) => document.getElementById(id);

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** A new HTML element; attributes that are null, undefined or false are left out. */
export const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

/** A new SVG element. */
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Say `text` to screen readers once, politely. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Show `sentence` in the page's alert, where it stays until it is dismissed or the next attempt. */
export function showAlert(sentence) {
  byId("alert").hidden = false;
  byId("alert-text").textContent = sentence;
}

export function hideAlert() {
  byId("alert").hidden = true;
  byId("alert-text").textContent = "";
}

/** Set `element.textContent` only if it differs: an unchanged live region then stays silent. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Call `send` on Enter in `area`; Shift+Enter, and Enter that ends an input method's composition, do what they always do. */
export function sendOnEnter(area, send) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.altKey || event.metaKey || event.isComposing)
      return;
    event.preventDefault();
    send();
  });
}

/** Offer `names` in `select`, the first as the default, keeping what is chosen if it is still there. */
export function fillMethods(select, names, preferred = 0) {
  const shown = Array.from(select.options, (option) => option.value);
  if (shown.join("\n") === names.join("\n")) return;
  const chosen =
    shown.length && names.includes(select.value) ? select.value : names[Math.min(preferred, names.length - 1)];
  select.replaceChildren(
    ...names.map((name, index) =>
      html("option", { value: name }, index === 0 && names.length > 1 ? `${name} (default)` : name),
    ),
  );
  select.value = chosen;
}
