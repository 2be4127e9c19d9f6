// Keeps what a person does: at once on this device, soon after on the server, and again until the server has it.
import { ask, askUntilThere, Refused, pause } from "./api.js";

const SOON_MS = 400;

export class Saver {
  // `told(kind, why)` hears of "saving", "saved", "kept_here" (the server is away) and "refused".
  constructor(run, person, told) {
    this.prefix = `tenfold/${run}/${person}/`;
    this.told = told;
    this.waiting = null; // the newest draft that the server has not
    this.timer = 0;
    this.sending = null;
    addEventListener("visibilitychange", () => document.visibilityState === "hidden" && this.sendLast());
    addEventListener("online", () => this.sendSoon(0));
  }

  // What this device holds of a task that the server may not have.
  draftHere(taskId) {
    return this.read(`draft/${taskId}`);
  }

  keep(taskId, state, timeMs) {
    const draft = { taskId, state, time_ms: timeMs };
    this.write(`draft/${taskId}`, draft);
    this.waiting = draft;
    this.told("saving");
    this.sendSoon(SOON_MS);
  }

  sendSoon(ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.sendDraft(), ms);
  }

  // One at a time, so that an older draft never comes after a newer one.
  sendDraft() {
    this.sending ??= this.sendAll().finally(() => { this.sending = null; });
    return this.sending;
  }

  async sendAll() {
    for (let wait = 1000; this.waiting; ) {
      const draft = this.waiting;
      try {
        await ask("PUT", `tasks/${draft.taskId}/draft`, { state: draft.state, time_ms: draft.time_ms });
        wait = 1000;
        if (this.waiting === draft) this.waiting = null;
      } catch (error) {
        if (error instanceof Refused) {
          if (this.waiting === draft) this.waiting = null;
          return this.told("refused", error.message);
        }
        this.told("kept_here");
        await pause(wait);
        wait = Math.min(2 * wait, 8000);
      }
    }
    this.told("saved");
  }

  // The page is going away: one more try that outlives it.
  sendLast() {
    const draft = this.waiting;
    if (!draft) return;
    const body = { state: draft.state, time_ms: draft.time_ms };
    ask("PUT", `tasks/${draft.taskId}/draft`, body, { keepalive: true }).catch(() => {});
  }

  // Hands in: kept here first, then sent until the server has it. Raises Refused. `what` is "verdict" or "skip".
  async handIn(taskId, what, body) {
    this.write("outbox", { taskId, what, body });
    this.drop();
    return this.sendOutbox();
  }

  // What was handed in and did not reach the server before the page was closed.
  async sendOutbox() {
    const kept = this.read("outbox");
    if (!kept) return null;
    try {
      const answer = await askUntilThere("POST", `tasks/${kept.taskId}/${kept.what}`, kept.body, () => this.told("sending"));
      this.remove(`draft/${kept.taskId}`);
      this.told("saved");
      return answer;
    } catch (error) {
      if (error instanceof Refused) this.told("refused", error.message);
      throw error;
    } finally {
      this.remove("outbox");
    }
  }

  drop() {
    clearTimeout(this.timer);
    this.waiting = null;
  }

  read(name) {
    try { return JSON.parse(localStorage.getItem(this.prefix + name)); } catch { return null; }
  }

  write(name, value) {
    try { localStorage.setItem(this.prefix + name, JSON.stringify(value)); } catch { /* full or forbidden: the server alone */ }
  }

  remove(name) {
    try { localStorage.removeItem(this.prefix + name); } catch { /* there is none */ }
  }
}

