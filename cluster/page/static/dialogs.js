// What opens over the page: guidelines, keys, progress with the past, reasons for a skip, a partial ranking.
import { ask } from "./api.js";
import { at, button, make, showHTML } from "./dom.js";
import { LIST, setSingleKeys, singleKeys } from "./keys.js";
import { en } from "./words-en.js";
import { duration, moment, t } from "./words.js";

const REASONS = ["skip_language", "skip_knowledge", "skip_broken", "skip_upsetting"];

export async function openGuidelines() {
  if (!at("guidelines-body").hasChildNodes()) {
    const { html } = await ask("GET", "guidelines");
    if (html) showHTML(at("guidelines-body"), html);
    else at("guidelines-body").replaceChildren(make("p", {}, t("no_guidelines")));
  }
  at("guidelines").showModal();
}

export function openKeys() {
  at("keys-on").checked = singleKeys();
  at("keys-on").onchange = () => setSingleKeys(at("keys-on").checked);
  at("keys-list").replaceChildren(
    ...LIST.map(([keys, what]) => make("div", {}, make("dt", {}, make("kbd", {}, keys)), make("dd", {}, t(what)))),
  );
  at("keys").showModal();
}

export async function openProgress(goBackTo) {
  const [progress, past] = await Promise.all([ask("GET", "tasks/progress"), ask("GET", "tasks?limit=50")]);
  const figures = ["num_ranked", "num_skipped", "num_left"].map((name) => [t(name), String(progress[name])]);
  figures.push([t("time_spent"), duration(progress.time_ms)]);
  at("figures").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  at("past").replaceChildren(...past.map((one) => pastRow(one, goBackTo)));
  if (!past.length) at("past").append(make("li", {}, t("past_none")));
  at("progress").showModal();
}

function pastRow(one, goBackTo) {
  const go = () => { at("progress").close(); goBackTo(one.task_id); };
  const note = one.skipped ? ` (${t("past_skipped")})` : "";
  return make("li", {}, button(`${one.question}${note}`, go, { class: "quiet", dir: "auto" }), make("small", {}, moment(one.created)));
}

// The reason for a skip, or null if there is to be none. Reasons of the list are kept in one language.
export function askReason() {
  const fieldset = at("reasons");
  for (const old of fieldset.querySelectorAll("label")) old.remove();
  fieldset.append(...REASONS.map((key, i) =>
    make("label", {}, make("input", { type: "radio", name: "reason", value: en[key], checked: i === 0 }), " ", t(key))));
  at("reason").value = "";
  return answerOf(at("skipping"), "skip", () => {
    const own = at("reason").value.trim();
    return own || fieldset.querySelector("input:checked").value;
  });
}

export function askPartial(labels) {
  at("partial-about").textContent = t("partial_about", { labels: labels.join(", ") });
  return answerOf(at("partial"), "so", () => true);
}

export function answerOf(dialog, yes, value) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === yes ? value() : null), { once: true });
  });
}
