// One answer on its card: the whole text, the grade, the flags, and in the second step its place.
import { button, make, showHTML } from "./dom.js";
import { FLAGS, GRADES, rankOf } from "./verdict.js";
import { t } from "./words.js";

export class CardView {
  // `does` holds what a card can ask for: grade, flag, move, tie, compare.
  constructor(card, does) {
    this.label = card.label;
    this.card = card;
    this.grades = GRADES.map((grade) => this.toggle(`grade.${grade}`, () => does.grade(card.label, grade)));
    this.flags = FLAGS.map((name) => this.toggle("flag", () => does.flag(card.label, name)));
    this.gradeGroup = make("div.grades", { role: "group" }, ...this.grades);
    this.flagGroup = make("div.flags", { role: "group" }, ...this.flags);
    this.up = button("↑", () => does.move(card.label, -1));
    this.down = button("↓", () => does.move(card.label, 1));
    this.equal = button("=", () => does.tie(card.label), { "aria-pressed": "false" });
    this.place = make("div.place", { hidden: true }, this.up, this.down, this.equal);
    this.compare = button("", () => does.compare(card.label), { class: "quiet", "aria-pressed": "false" });
    this.more = button("", () => this.expand(!this.expanded), { class: "quiet", "aria-expanded": "false" });
    this.rank = make("span.rank");
    this.title = make("h3", { id: `title-${card.label}` });
    this.head = make("header", {}, this.title, this.rank, this.place);
    this.body = make("div.answer", { id: `answer-${card.label}` });
    this.more.setAttribute("aria-controls", this.body.id);
    this.body.addEventListener("focusin", () => this.expand(true)); // what has the focus is seen
    this.element = make(
      "article.card",
      { tabindex: "0", id: `card-${card.label}`, "aria-labelledby": this.title.id, "data-label": card.label },
      this.head, this.gradeGroup, this.body,
      make("div.reading", {}, this.more, this.compare), this.flagGroup,
    );
    this.expanded = false;
    this.showText(false);
    new ResizeObserver(() => this.measure()).observe(this.body);
  }

  toggle(kind, onclick) {
    const made = button("", onclick, { "aria-pressed": "false" });
    made.classList.add(...kind.split("."));
    return made;
  }

  // With its layout, or as the characters that it is made of.
  showText(plain) {
    if (plain) this.body.replaceChildren(make("p.plain", { dir: "auto" }, this.card.text));
    else showHTML(this.body, this.card.html);
    this.measure();
  }

  expand(wanted) {
    if (wanted === this.expanded) return;
    this.expanded = wanted;
    this.measure();
  }

  // The button for the rest is there where there is a rest.
  measure() {
    this.body.classList.toggle("cut", !this.expanded);
    const isLong = this.expanded || this.body.scrollHeight > this.body.clientHeight + 2;
    this.body.classList.toggle("fades", isLong && !this.expanded);
    this.more.hidden = !isLong;
    this.more.setAttribute("aria-expanded", String(this.expanded));
    this.more.textContent = t(this.expanded ? "show_less" : "show_all", { label: this.label });
  }

  update(verdict, compared) {
    const { label } = this;
    const grade = verdict.grades[label];
    const step2 = verdict.step === 2 && grade !== undefined;
    this.title.textContent = t("answer", { label });
    this.gradeGroup.setAttribute("aria-label", t("grade_of", { label }));
    this.flagGroup.setAttribute("aria-label", t("flags_of", { label }));
    GRADES.forEach((name, i) => set(this.grades[i], t(name), name === grade));
    FLAGS.forEach((name, i) => set(this.flags[i], t(name), (verdict.flags[label] ?? []).includes(name)));
    this.element.dataset.grade = grade ?? "";
    this.place.hidden = !step2;
    const rank = step2 ? rankOf(verdict, label) : null;
    this.rank.textContent = rank ? t(rank.shared ? "rank_shared" : "rank_n", { n: rank.rank }) : "";
    const tied = Boolean(rank?.shared) && verdict.tiers[grade].some((tier) => tier.length > 1 && tier.includes(label));
    name(this.up, t("better", { label }));
    name(this.down, t("worse", { label }));
    name(this.equal, t(tied ? "untie" : "tie", { label }));
    this.equal.setAttribute("aria-pressed", String(tied));
    set(this.compare, t("compare_it", { label }), compared.includes(label));
    this.element.draggable = step2;
    this.measure();
  }
}

function set(element, text, pressed) {
  element.textContent = text;
  element.setAttribute("aria-pressed", String(pressed));
}

function name(element, text) {
  element.setAttribute("aria-label", text);
  element.title = text;
}
