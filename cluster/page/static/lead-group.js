// One prompt with its answers, and what everybody said of them.
import { ask } from "./api.js";
import { at, make, showHTML } from "./dom.js";
import { turnView } from "./prompt.js";
import { number, table } from "./tables.js";
import { duration, moment, t } from "./words.js";

export async function openGroup(row) {
  const group = await ask("GET", `lead/group?prompt_id=${encodeURIComponent(row.prompt_id)}&round=${row.round}`);
  at("group-title").textContent = t("group_title", { id: group.prompt_id });
  at("group-turns").replaceChildren(...group.turns.map(turnView));
  table(at("said"), ["person", "ranking", "flagged", "order_shown", "time", "when", "state"].map((key) => t(key)), group.submissions.map(saidRow));
  if (!group.submissions.length) at("said").replaceChildren(make("caption", {}, t("none_yet")));
  at("group-answers").replaceChildren(...group.answers.map(answerView));
  at("group").showModal();
}

const numbers = (indices) => indices.map((index) => index + 1).join(" = ");

function saidRow(one) {
  const grades = (tier) => [...new Set(tier.map((index) => one.grades[index]).filter(Boolean))].map((grade) => t(grade)).join(", ");
  const tiers = one.tiers.map((tier) => `${numbers(tier)}${grades(tier) ? ` (${grades(tier)})` : ""}`).join(" > ");
  const flags = Object.entries(one.flags).map(([index, names]) => `${Number(index) + 1}: ${names.map((name) => t(name)).join(", ")}`);
  const states = one.repeat ? [t("repeat"), ...(one.withdrawn ? [t("set_aside")] : [])]
    : [t(one.counts ? "counts" : one.withdrawn ? "set_aside" : "old")];
  const said = one.skipped ? `${t("skip")}: ${one.reason}` : [one.all_wrong ? t("all_wrong") : "", tiers].filter(Boolean).join(": ");
  return [
    one.person, said, flags.join("; "), one.order.map((index) => index + 1).join(" "), duration(one.time_ms), moment(one.created),
    states.join(", "),
  ];
}

function answerView(answer) {
  const body = make("div.answer");
  showHTML(body, answer.html);
  const score = answer.score === null ? null : make("small", {}, ` ${t("score", { score: number(answer.score) })}`);
  return make("article", {}, make("h4", {}, t("number", { n: answer.index + 1 }), score), body);
}
