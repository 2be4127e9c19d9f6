// The prompt, which stays in view; a long one opens and closes.
import { at, make, showHTML } from "./dom.js";
import { t } from "./words.js";

export function fillPrompt(turns) {
  at("turns").replaceChildren(...turns.map(turnView));
  at("prompt").classList.remove("open");
  at("turns").scrollTop = at("turns").scrollHeight; // the last turn is what was asked
  measure();
}

export function turnView(turn) {
  const body = make("div.answer");
  showHTML(body, turn.html);
  const known = ["system", "user", "assistant"].includes(turn.role);
  return make(`div.turn.${known ? turn.role : "other"}`, {}, make("strong.role", {}, known ? t(turn.role) : turn.role), body);
}

function measure() {
  const open = at("prompt").classList.contains("open");
  const more = at("more-prompt");
  more.hidden = !open && at("turns").scrollHeight <= at("turns").clientHeight + 2;
  more.textContent = t(open ? "less_prompt" : "more_prompt");
  more.setAttribute("aria-expanded", String(open));
}

// What has the focus is never behind what stays in view.
export function keepInView() {
  at("more-prompt").addEventListener("click", () => {
    at("prompt").classList.toggle("open");
    measure();
  });
  const room = () => {
    const { style } = document.documentElement;
    style.setProperty("--above", `${at("prompt").offsetHeight}px`);
    style.setProperty("--below", `${at("bar").offsetHeight}px`);
  };
  const watched = new ResizeObserver(() => { room(); measure(); });
  for (const id of ["prompt", "bar"]) watched.observe(at(id));
}
