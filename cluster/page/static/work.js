// One task under way: what is thought of it now, what was thought before, and the time that went into it.
import { blank, fromSaid } from "./verdict.js";

const IDLE_MS = 60_000; // without a key, a touch or a scroll, nobody is working
const MOST_UNDO = 200;

export class Work {
  // `kept` is what this device holds of the task: it counts if it is newer than what the server has.
  constructor(task, kept, changed) {
    this.task = task;
    this.changed = changed;
    this.past = [];
    this.future = [];
    const fits = [task.draft, kept].filter((draft) => draft && draft.state.base === task.created && draft.state.verdict);
    const newest = fits.sort((one, other) => other.state.rev - one.state.rev)[0];
    this.handedIn = task.said ? fromSaid(task.said) : blank();
    this.verdict = newest?.state.verdict ?? this.handedIn;
    this.rev = newest?.state.rev ?? 0;
    this.restored = JSON.stringify(this.verdict) !== JSON.stringify(this.handedIn);
    this.newerHere = newest === kept && kept !== null && kept.state.rev > (task.draft?.state.rev ?? 0);
    this.watch = new Stopwatch(Math.max(task.time_ms, kept?.time_ms ?? 0));
  }

  get state() {
    return { verdict: this.verdict, rev: this.rev, base: this.task.created };
  }

  get isCorrection() {
    return this.task.created !== null;
  }

  change(verdict) {
    if (JSON.stringify(verdict) === JSON.stringify(this.verdict)) return false;
    this.past = [...this.past, this.verdict].slice(-MOST_UNDO);
    this.future = [];
    this.become(verdict);
    return true;
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.verdict);
    this.become(this.past.pop());
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.verdict);
    this.become(this.future.pop());
    return true;
  }

  // As it was handed in, or empty.
  startAgain() {
    this.change(this.handedIn);
  }

  become(verdict) {
    this.verdict = verdict;
    this.rev += 1;
    this.changed();
  }

  close() {
    this.watch.close();
  }
}

// Milliseconds for which somebody was at work here: the page was seen, and something was done within the last minute.
class Stopwatch {
  constructor(ms) {
    this.ms = ms;
    this.last = this.active = performance.now();
    this.note = () => { this.tick(); this.active = performance.now(); };
    this.events = ["keydown", "pointerdown", "pointermove", "scroll", "visibilitychange"];
    for (const name of this.events) addEventListener(name, this.note, { passive: true, capture: true });
    this.timer = setInterval(() => this.tick(), 1000);
  }

  tick() {
    const now = performance.now();
    const until = Math.min(now, this.active + IDLE_MS);
    if (document.visibilityState === "visible") this.ms += Math.max(0, until - this.last);
    this.last = now;
  }

  get time() {
    this.tick();
    return Math.round(this.ms);
  }

  close() {
    clearInterval(this.timer);
    for (const name of this.events) removeEventListener(name, this.note, { capture: true });
  }
}
