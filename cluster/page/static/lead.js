// The lead's page: how far it is, how far people agree, any ranking, and setting a person's aside.
import { ask, askUntilThere } from "./api.js";
import { answerOf } from "./dialogs.js";
import { at, button, make } from "./dom.js";
import { fillHeader, signInByLink } from "./header.js";
import { openGroup } from "./lead-group.js";
import { figures, number, table } from "./tables.js";
import { chooseLanguage, currentLanguage, duration, moment, setLanguage, t } from "./words.js";

const AGAIN_MS = 10_000;
const A_PAGE = 50;
let offset = 0;
let progress, agreement, groups, rounds;

async function start() {
  await signInByLink();
  const me = await askUntilThere("GET", "me", undefined, () => {});
  chooseLanguage(me.language);
  setLanguage(currentLanguage(), false);
  fillHeader(me, show);
  at("refresh").addEventListener("click", refresh);
  at("round").addEventListener("change", () => turn(-offset));
  at("before").addEventListener("click", () => turn(-A_PAGE));
  at("after").addEventListener("click", () => turn(A_PAGE));
  await refresh();
  setInterval(() => { if (!document.hidden && !document.querySelector("dialog[open]")) refresh(); }, AGAIN_MS);
}

function turn(by) {
  offset += by;
  return refresh();
}

async function refresh() {
  const round = at("round").value ? `round=${at("round").value}&` : "";
  try {
    [rounds, progress, agreement, groups] = await Promise.all([
      ask("GET", "lead/rounds"), ask("GET", `lead/progress?${round}`), ask("GET", `lead/agreement?${round}`),
      ask("GET", `lead/groups?${round}offset=${offset}&limit=${A_PAGE}`),
    ]);
    show();
    at("updated").textContent = t("updated", { time: new Date().toLocaleTimeString(document.documentElement.lang) });
  } catch (error) {
    at("updated").textContent = t("fail", { why: error.message });
  }
}

function show() {
  if (!progress) return;
  showRounds();
  at("share").value = progress.num_wanted ? progress.num_rankings / progress.num_wanted : 0;
  figures(at("figures"), [
    [t("groups_done"), `${progress.num_done} / ${progress.num_groups}`],
    [t("rankings_in"), `${progress.num_rankings} / ${progress.num_wanted}`],
    [t("open_now"), progress.num_open], [t("closed"), progress.num_closed],
  ]);
  at("short").hidden = !progress.num_short;
  at("short").textContent = t("short", { n: progress.num_short });
  figures(at("agreement"), ["tau", "alpha", "alpha_grades", "with_reward", "with_self"]
    .map((name) => [t(name), number(agreement[name])]).concat([[t("num_common"), agreement.num_groups]]));
  showPeople();
  table(at("pairs"), [t("person"), t("person"), t("tau"), t("num_common")],
    agreement.pairs.map((pair) => [pair.one, pair.other, number(pair.tau), pair.num_groups]));
  table(at("groups"), [t("question"), t("round"), t("num_rankings"), t("skips"), ""], groups.map((row) => [
    make("span", { dir: "auto" }, row.question), row.round + 1, row.imported ? row.num_rankings : `${row.num_rankings} / ${progress.quota}`, row.num_skips + (row.closed ? ` (${t("closed")})` : ""),
    button(t("look_at"), () => openGroup(row), { "aria-label": `${t("look_at")}: ${row.question}` }),
  ]));
  at("page").textContent = t("page_of", { first: groups.length ? offset + 1 : 0, last: offset + groups.length, all: progress.num_groups });
  at("before").disabled = offset === 0;
  at("after").disabled = offset + groups.length >= progress.num_groups;
}

function showRounds() {
  const choice = at("round");
  const chosen = choice.value;
  choice.replaceChildren(make("option", { value: "" }, t("all_rounds")), ...rounds.map((n) => make("option", { value: n }, String(n + 1))));
  choice.value = chosen;
}

function showPeople() {
  const heads = ["person", "role", "ranked", "skips", "repeats", "median_time", "last_seen", "with_others", "with_self", "with_reward", "state"];
  const measured = new Map(agreement.people.map((one) => [one.person, one]));
  const rows = progress.people.map((one) => {
    const found = measured.get(one.person.name) ?? {};
    return [
      one.person.name, t(one.person.role), one.num_ranked, one.num_skipped, one.num_repeats, duration(one.median_time_ms),
      moment(one.last_seen), number(found.with_others), number(found.with_self), number(found.with_reward), setAsideButton(one.person),
    ];
  });
  table(at("people"), heads.map((name) => t(name)), rows);
  progress.people.forEach((one, i) => at("people").tBodies[0].rows[i].classList.toggle("aside", one.person.withdrawn));
}

function setAsideButton(person) {
  if (person.role === "lead") return "";
  const kind = person.withdrawn ? "reinstate" : "withdraw";
  return button(t(kind), () => setAside(person, kind), { "aria-label": t(`${kind}_of`, { name: person.name }) });
}

async function setAside(person, kind) {
  at("setting-title").textContent = t(`${kind}_title`, { name: person.name });
  at("setting-about").textContent = t(`${kind}_about`);
  at("why").value = "";
  const reason = await answerOf(at("setting"), "yes", () => at("why").value.trim());
  if (reason === null) return;
  try {
    await ask("POST", `lead/${kind}`, { name: person.name, reason });
  } catch (error) {
    at("updated").textContent = t("fail", { why: error.message });
    return;
  }
  await refresh();
}

start();
