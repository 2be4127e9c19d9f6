// Any two answers side by side, the prompt above them: a dialog over the page.
import { at, make, showHTML } from "./dom.js";
import { turnView } from "./prompt.js";
import { place, rankOf } from "./verdict.js";
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
    if (!verdict.grades[left] && !verdict.grades[right]) {
      at("compare-said").textContent = t("sort_first");
      return;
    }
    const [better, worse] = where === "below" ? [right, left] : [left, right];
    this.does.change(where === "equal" ? level(verdict, left, right) : lift(verdict, better, worse));
    at("compare-said").textContent = t({ above: "left_better", below: "right_better", equal: "both_equal" }[where], { left, right });
  }

  key(event) {
    if (event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
    const said = { ArrowLeft: "above", ArrowRight: "below", "=": "equal" }[event.key];
    if (!said) return;
    event.preventDefault();
    if (this.labels[0] !== this.labels[1]) this.say(said);
  }
}

// The better one goes above the worse one, into its grade, unless it stands above it already.
function lift(verdict, better, worse) {
  if (!verdict.grades[worse]) return place(verdict, worse, "below", better);
  const [one, other] = [rankOf(verdict, better), rankOf(verdict, worse)];
  return one && one.rank < other.rank ? verdict : place(verdict, better, "above", worse);
}

function level(verdict, left, right) {
  return verdict.grades[right] ? place(verdict, left, "equal", right) : place(verdict, right, "equal", left);
}
