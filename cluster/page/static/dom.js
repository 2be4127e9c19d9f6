// Small ways to build and find elements. Text goes in as text; HTML only through `showHTML`.

// A policy is the browser's word that nothing else here makes HTML out of text.
const policy = globalThis.trustedTypes?.createPolicy("answers", { createHTML: (html) => html });

// HTML of the server's, which has made it harmless.
export function showHTML(element, html) {
  element.innerHTML = policy ? policy.createHTML(html) : html;
}

export const at = (id) => document.getElementById(id);

// make("button.wide", { type: "button", onclick: f, "aria-pressed": "false" }, "text", child, ...)
export function make(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(text, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, text);
}

// Said aloud by screen readers, without taking the focus.
export function announce(text) {
  const place = at("spoken");
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}
