// What the page tells in passing: whether all is saved, and what was just done.
import { at } from "./dom.js";
import { t } from "./words.js";

const SHOWN_MS = 8000;
let timer = 0;
let last = "";

export function showSaved(kind, why = "") {
  const text = t(kind, { why });
  at("saved").dataset.kind = kind;
  if (kind === "refused" || ((kind === "kept_here" || kind === "sending") && last !== kind)) toast(text);
  if (text !== at("saved").textContent) at("saved").textContent = text;
  last = kind;
}

export function toast(text, offer, act) {
  clearTimeout(timer);
  at("toast").hidden = false;
  at("toast-text").textContent = text;
  at("toast-button").hidden = !offer;
  at("toast-button").textContent = offer ?? "";
  at("toast-button").onclick = () => { at("toast").hidden = true; act(); };
  timer = setTimeout(() => { at("toast").hidden = true; }, SHOWN_MS);
}
