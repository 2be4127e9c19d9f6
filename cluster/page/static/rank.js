// The page of those who rank: one task after the other.
import { ask, askUntilThere, Away, Refused } from "./api.js";
import { Arrangement } from "./arrange.js";
import { CardView } from "./cards.js";
import { Comparison } from "./compare.js";
import { askPartial, askReason, openGuidelines, openKeys, openProgress } from "./dialogs.js";
import { announce, at } from "./dom.js";
import { letDrag } from "./drag.js";
import { fillHeader, signInByLink } from "./header.js";
import { listen } from "./keys.js";
import { fillPrompt, keepInView } from "./prompt.js";
import { Saver } from "./saving.js";
import { showSaved, toast } from "./told.js";
import * as V from "./verdict.js";
import { Work } from "./work.js";
import { chooseLanguage, currentLanguage, setLanguage, t } from "./words.js";

const LOOK_MS = 30_000;
let me, saver, work, views, arrangement;
let compared = [];
let plain = false;
let busy = false;
let lastTask = null; // handed in last
let looking = 0;

const comparison = new Comparison({
  verdict: () => work.verdict,
  change: (verdict) => change(verdict),
  card: (label) => views.get(label).card,
  labels: () => [...views.keys()],
  turns: () => work.task.turns,
});

async function start() {
  await signInByLink();
  me = await askUntilThere("GET", "me", undefined, () => say("loading"));
  chooseLanguage(me.language);
  setLanguage(currentLanguage(), false);
  saver = new Saver(me.run, me.name, showSaved);
  fillHeader(me, () => { if (work) { prompt(); show(); } });
  bind();
  try {
    await saver.sendOutbox();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
  await next();
}

async function next() {
  say("loading");
  clearTimeout(looking);
  const given = await askUntilThere("POST", "tasks/next", undefined, () => showSaved("kept_here"));
  at("message").hidden = true;
  count(given.progress);
  if (given.task) open(given.task);
  else idle();
}

function open(task) {
  work?.close();
  saver.drop();
  work = new Work(task, saver.draftHere(task.id), () => { save(); show(); });
  const does = { grade, flag: (label, name) => change(V.flag(work.verdict, label, name)), move, tie, compare };
  views = new Map(task.cards.map((card) => [card.label, new CardView(card, does)]));
  arrangement = new Arrangement(at("answers"), views);
  compared = [];
  plain = false;
  for (const [id, hidden] of [["work", false], ["prompt", false], ["bar", false], ["idle", true]]) at(id).hidden = hidden;
  prompt();
  show();
  scrollTo(0, 0);
  at("step").focus({ preventScroll: true });
  if (work.newerHere) save();
  if (work.restored) announce(t("restored"));
}

function idle() {
  work?.close();
  work = null;
  for (const [id, hidden] of [["work", true], ["prompt", true], ["bar", true], ["idle", false]]) at(id).hidden = hidden;
  at("idle-title").textContent = t(me.withdrawn ? "withdrawn" : "nothing_left");
  at("idle-about").textContent = me.withdrawn ? "" : t("nothing_left_about");
  looking = setTimeout(next, LOOK_MS);
}

function prompt() {
  fillPrompt(work.task.turns);
}

function show() {
  const { verdict } = work;
  arrangement.update(verdict, currentLanguage());
  for (const view of views.values()) view.update(verdict, compared);
  at("step").textContent = t(verdict.step === 1 ? "step_1" : "step_2");
  at("about").textContent = t(verdict.step === 1 ? "about_1" : "about_2");
  at("correcting").hidden = !work.isCorrection;
  at("correcting").textContent = work.task.reason ? t("was_skipped", { reason: work.task.reason }) : t("correcting");
  at("sorted").textContent = t("sorted_of", { n: V.numRanked(verdict), all: views.size });
  at("to-sort").hidden = verdict.step === 1;
  at("leave").hidden = !work.isCorrection;
  at("next").textContent = t(verdict.step === 1 ? "to_order" : work.isCorrection ? "correct" : "hand_in");
  at("all-wrong").setAttribute("aria-pressed", String(verdict.allWrong));
  at("undo").disabled = !work.past.length;
  at("redo").disabled = !work.future.length;
  at("as-text").setAttribute("aria-pressed", String(plain));
}

function change(verdict, spoken) {
  if (busy || !work.change(verdict)) return false;
  if (spoken) announce(spoken);
  return true;
}

function save() {
  saver.keep(work.task.id, work.state, work.watch.time);
}

function grade(label, name) {
  const had = work.verdict.grades[label];
  change(V.sort(work.verdict, label, had === name ? null : name), `${t("answer", { label })}: ${t(had === name ? "not_sorted" : name)}`);
}

function place(label) {
  const found = V.rankOf(work.verdict, label);
  return found ? `${label}: ${t(found.shared ? "rank_shared" : "rank_n", { n: found.rank })}` : label;
}

function move(label, by) {
  if (work.verdict.step === 2 && change(V.move(work.verdict, label, by))) announce(place(label));
}

function tie(label) {
  if (work.verdict.step === 2 && change(V.tie(work.verdict, label))) announce(place(label));
}

function compare(label) {
  compared = compared.includes(label) ? compared.filter((other) => other !== label) : [...compared, label];
  if (compared.length === 2) {
    comparison.open(...compared);
    compared = [];
  } else if (compared.length) announce(t("compare_other", { label }));
  show();
}

async function forward() {
  if (!work || busy) return;
  const { verdict } = work;
  if (verdict.step === 1 && (V.numRanked(verdict) >= 2 || !verdict.allWrong)) {
    if (!V.canHandIn(verdict)) return toast(t("too_few"));
    step(2);
    return;
  }
  if (!V.canHandIn(verdict)) return toast(t("too_few"));
  const left = [...views.keys()].filter((label) => !verdict.grades[label]);
  if (left.length && !verdict.allWrong && !(await askPartial(left))) return;
  await handIn("verdict", { ...V.toSaid(verdict), time_ms: work.watch.time }, "handed_in");
}

function step(number) {
  change(V.goTo(work.verdict, number));
  scrollTo(0, 0);
  at("step").focus({ preventScroll: true });
}

async function skip() {
  if (!work || busy) return;
  const reason = await askReason();
  if (reason) await handIn("skip", { reason, time_ms: work.watch.time }, "skipped");
}

async function handIn(what, body, told) {
  const taskId = work.task.id;
  busy = true;
  at("next").disabled = true;
  try {
    await saver.handIn(taskId, what, body);
    lastTask = taskId;
    toast(t(told), t("go_back_to_it"), () => goBackTo(taskId));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return;
  } finally {
    busy = false;
    at("next").disabled = false;
  }
  await next();
}

// What was handed in stays, and so does nothing of the correction.
async function leave() {
  if (!work || busy) return;
  work.startAgain();
  await saver.sendDraft();
  await next();
}

async function goBackTo(taskId) {
  if (busy) return;
  if (work) await saver.sendDraft();
  open(await askUntilThere("GET", `tasks/${taskId}`, undefined, () => showSaved("kept_here")));
}

async function back() {
  lastTask ??= (await ask("GET", "tasks?limit=1"))[0]?.task_id;
  if (lastTask) await goBackTo(lastTask);
}

function go(label) {
  const { element } = views.get(label);
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest" });
}

// The label of the card that has the focus, or null.
function here() {
  return document.activeElement.closest?.(".card")?.dataset.label ?? null;
}

function onCard(act) {
  return (value) => {
    if (!work) return false;
    const label = here();
    if (label) return act(label, value);
    go(arrangement.labels.find((other) => !work.verdict.grades[other]) ?? arrangement.labels[0]); // it acts from there on
    return true;
  };
}

function gradeAndGoOn(label, number) {
  change(V.sort(work.verdict, label, V.GRADES[number]), `${t("answer", { label })}: ${t(V.GRADES[number])}`);
  if (work.verdict.step !== 1) return;
  const { labels } = arrangement;
  const after = [...labels.slice(labels.indexOf(label) + 1), ...labels];
  const open = after.find((other) => !work.verdict.grades[other]);
  if (open) go(open);
}

function side(label, by) {
  const { labels } = arrangement;
  const other = labels[labels.indexOf(label) + by];
  if (other) go(other);
}

function showPlain() {
  plain = !plain;
  for (const view of views.values()) view.showText(plain);
  show();
}

function undo() {
  if (work?.undo()) announce(t("undone"));
}

function redo() {
  if (work?.redo()) announce(t("redone"));
}

// What needs the server now, and says so where there is none.
function orTell(act) {
  return () => {
    act().catch((error) => {
      if (!(error instanceof Away)) throw error;
      toast(t("kept_here"));
    });
  };
}

function bind() {
  const progress = orTell(() => openProgress(goBackTo));
  const guidelines = orTell(openGuidelines);
  const onWork = (act) => () => (work ? act() : false);
  const clicks = {
    "open-progress": progress, "open-guidelines": guidelines, "open-keys": openKeys,
    "as-text": onWork(showPlain), undo, redo, skip, next: forward, "to-sort": () => step(1), leave,
    "all-wrong": () => change(V.callAllWrong(work.verdict)), "look-again": next,
  };
  for (const [id, act] of Object.entries(clicks)) at(id).addEventListener("click", act);
  const flags = Object.fromEntries(V.FLAGS.map((name) => [name, onCard((label) => change(V.flag(work.verdict, label, name)))]));
  listen(
    {
      ...flags, undo, redo, skip: onWork(skip), next: onWork(forward), back: orTell(back), guidelines, keys: openKeys,
      progress, as_text: onWork(showPlain), compare: onCard(compare),
      previous: onWork(() => work.verdict.step === 2 && step(1)), all_wrong: onWork(clicks["all-wrong"]),
      grade: onCard(gradeAndGoOn), ungrade: onCard((label) => change(V.sort(work.verdict, label, null))),
      tie: onCard(tie), move: onCard((label, by) => (work.verdict.step === 2 ? move(label, by) : false)),
      side: onCard(side), expand: onCard((label) => views.get(label).expand(!views.get(label).expanded)),
    },
    () => (work ? [...views.keys()] : []), go,
  );
  letDrag(at("answers"), (label, where, other) => change(V.place(work.verdict, label, where, other)));
  keepInView();
}

function count(progress) {
  const done = progress.num_ranked + progress.num_skipped;
  at("count").textContent = t("done_left", { done, left: progress.num_left });
  at("share").value = done + progress.num_left ? done / (done + progress.num_left) : 0;
}

function say(key) {
  at("message").hidden = false;
  at("message").textContent = t(key);
}

start();
