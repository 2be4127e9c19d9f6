// Figures and tables.
import { make } from "./dom.js";

export const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));

export function figures(place, pairs) {
  place.replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

// Rows of texts, numbers and elements; the first of each row is its head. The focus stays where it was.
export function table(place, heads, rows) {
  const cells = place.tBodies[0] ? [...place.tBodies[0].querySelectorAll("button")] : [];
  const held = cells.indexOf(document.activeElement);
  const isNumber = heads.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const kind = (tag, i) => (isNumber[i] ? `${tag}.number` : tag);
  place.replaceChildren(
    make("thead", {}, make("tr", {}, ...heads.map((head, i) => (head ? make(kind("th", i), { scope: "col" }, head) : make("td"))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, i) =>
      make(kind(i ? "td" : "th", i), i ? {} : { scope: "row" }, value instanceof Node ? value : String(value)))))),
  );
  if (held >= 0) place.tBodies[0].querySelectorAll("button")[held]?.focus();
}
