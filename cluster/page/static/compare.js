// Any two answers side by side, the prompt above them: a dialog over the page.
import { at, make, showHTML } from "./dom.js";
import { turnView } from "./prompt.js";
import { place } from "./verdict.js";
import { t } from "./words.js";

export class Comparison {
  constructor(does) {
    this.does = does; // { verdict(), change(verdict), card(label), labels(), turns() }
    this.sides = ["left", "right"];
    for (const side of this.sides) at(`compare-${side}`).addEventListener("change", () => this.fill());
    at("left-better").addEventListener("click", () => this.say("above"));
    at("right-better").addEventListener("click", () => this.say("below"));
    at("both-equal").addEventListener("click", () => this.say("equal"));
    at("compare").addEventListener("keydown", (event) => this.key(event));
  }

  open(left, right) {
    for (const side of this.sides) {
      at(`compare-${side}`).replaceChildren(
        ...this.does.labels().map((label) => make("option", { value: label }, t("answer", { label }))),
      );
    }
    at("compare-prompt").replaceChildren(...this.does.turns().map(turnView));
    at("compare-left").value = left;
    at("compare-right").value = right;
    this.fill();
    at("compare").showModal();
    at("compare-prompt").scrollTop = at("compare-prompt").scrollHeight;
    at("left-answer").focus();
  }

  get labels() {
    return this.sides.map((side) => at(`compare-${side}`).value);
  }

  fill() {
    const [left, right] = this.labels;
    this.sides.forEach((side, i) => {
      showHTML(at(`${side}-answer`), this.does.card(this.labels[i]).html);
      at(`${side}-answer`).setAttribute("aria-label", t("answer", { label: this.labels[i] }));
    });
    at("left-better").textContent = t("left_better", { left });
    at("right-better").textContent = t("right_better", { right });
    for (const id of ["left-better", "right-better", "both-equal"]) at(id).disabled = left === right;
    at("compare-said").textContent = "";
  }

  say(where) {
    const [left, right] = this.labels;
    const verdict = this.does.verdict();
    const [known, other] = verdict.grades[right] ? [right, left] : [left, right];
    if (!verdict.grades[known]) {
      at("compare-said").textContent = t("sort_first");
      return;
    }
    // An answer that has no grade yet takes the other's; one that has keeps it where the grades say the same already.
    const turned = known === right ? where : { above: "below", below: "above", equal: "equal" }[where];
    const agreed = verdict.grades[other] && this.gradesSay(verdict, left, right) === where;
    if (!agreed) this.does.change(place(verdict, other, turned, known));
    const key = { above: "left_better", below: "right_better", equal: "both_equal" }[where];
    at("compare-said").textContent = t(key, { left, right });
  }

  gradesSay(verdict, left, right) {
    const order = ["good", "fair", "bad", "unusable"];
    const by = order.indexOf(verdict.grades[left]) - order.indexOf(verdict.grades[right]);
    return by < 0 ? "above" : by > 0 ? "below" : null;
  }

  key(event) {
    if (event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
    const said = { ArrowLeft: "above", ArrowRight: "below", "=": "equal" }[event.key];
    if (!said) return;
    event.preventDefault();
    if (this.labels[0] !== this.labels[1]) this.say(said);
  }
}

