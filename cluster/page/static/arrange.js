// Where the cards stand: in the order shown while they are sorted; by grade and tier while they are ordered.
import { make } from "./dom.js";
import { GRADES } from "./verdict.js";
import { t } from "./words.js";

export class Arrangement {
  constructor(place, views) {
    this.place = place;
    this.views = views; // label -> CardView, in the order shown
    this.last = "";
  }

  update(verdict, language) {
    const now = JSON.stringify([verdict.step, verdict.step === 2 ? [verdict.tiers, verdict.grades] : 0, language]);
    if (now === this.last) return;
    this.last = now;
    const focused = document.activeElement;
    const held = focused && this.place.contains(focused);
    this.place.replaceChildren(...(verdict.step === 1 ? [this.grid()] : this.sections(verdict)));
    if (held && focused.isConnected) {
      focused.focus({ preventScroll: true });
      focused.closest(".card")?.scrollIntoView({ block: "nearest" });
    }
  }

  grid() {
    return make("div.grid", {}, ...[...this.views.values()].map((view) => view.element));
  }

  sections(verdict) {
    const made = GRADES.filter((grade) => verdict.tiers[grade].length).map((grade) =>
      this.section(grade, t(grade), make("ol.tiers", {}, ...verdict.tiers[grade].map((tier) => this.tier(tier)))));
    const left = [...this.views.keys()].filter((label) => !verdict.grades[label]);
    if (left.length) made.push(this.section("none", t("not_sorted"), make("div.grid", {}, ...left.map((label) => this.views.get(label).element))));
    return made;
  }

  section(kind, title, body) {
    return make("section.grade-section", { "data-grade": kind, "aria-label": title }, make("h2", {}, title), body);
  }

  tier(labels) {
    return make("li.tier", {}, ...labels.map((label) => this.views.get(label).element));
  }

  // Labels as they stand, first to last.
  get labels() {
    return [...this.place.querySelectorAll(".card")].map((card) => card.dataset.label);
  }
}
