// What a person thinks of a group, as a value: every change makes a new one.
//
// { grades: {A: "good"}, tiers: {good: [["A"], ["C", "B"]], ...}, flags: {A: ["unsafe"]}, allWrong, step }
// The tiers of a grade hold exactly the answers of that grade, best first; those in one tier are equal.

export const GRADES = ["good", "fair", "bad", "unusable"];
export const FLAGS = ["unsafe", "untrue", "off_question", "broken"];

export function blank() {
  return { grades: {}, tiers: { good: [], fair: [], bad: [], unusable: [] }, flags: {}, allWrong: false, step: 1 };
}

// Of what was handed in. Answers that were ranked without a grade have nothing to stand in, and are left out.
export function fromSaid(said) {
  const made = { ...blank(), grades: { ...said.grades }, flags: { ...said.flags }, allWrong: said.all_wrong, step: 2 };
  for (const grade of GRADES) {
    const tiers = said.tiers.map((tier) => tier.filter((label) => said.grades[label] === grade));
    made.tiers[grade] = tiers.filter((tier) => tier.length);
    const placed = made.tiers[grade].flat();
    const left = Object.keys(said.grades).filter((label) => said.grades[label] === grade && !placed.includes(label));
    if (left.length) made.tiers[grade].push(left);
  }
  return made;
}

export function toSaid(verdict) {
  return {
    tiers: GRADES.flatMap((grade) => verdict.tiers[grade]).map((tier) => [...tier]),
    grades: verdict.grades,
    flags: Object.fromEntries(Object.entries(verdict.flags).filter(([, flags]) => flags.length)),
    all_wrong: verdict.allWrong,
  };
}

// A new answer of a grade is equal to the last ones of it, until it is ordered.
export function sort(verdict, label, grade) {
  const made = without(verdict, label);
  if (!grade) return made;
  const tiers = made.tiers[grade];
  const joined = tiers.length ? [...tiers.slice(0, -1), [...tiers.at(-1), label].sort()] : [[label]];
  return { ...made, grades: { ...made.grades, [label]: grade }, tiers: { ...made.tiers, [grade]: joined } };
}

// `by` is -1 for better, 1 for worse: out of a tie, or past the next ones.
export function move(verdict, label, by) {
  const grade = verdict.grades[label];
  if (!grade) return verdict;
  const tiers = verdict.tiers[grade].map((tier) => [...tier]);
  const place = tiers.findIndex((tier) => tier.includes(label));
  if (tiers[place].length > 1) {
    tiers[place] = tiers[place].filter((other) => other !== label);
    tiers.splice(by < 0 ? place : place + 1, 0, [label]);
  } else {
    const next = place + by;
    if (next < 0 || next >= tiers.length) return verdict;
    [tiers[place], tiers[next]] = [tiers[next], tiers[place]];
  }
  return { ...verdict, tiers: { ...verdict.tiers, [grade]: tiers } };
}

// Makes an answer equal to those above it; one that is equal to others is taken out below them.
export function tie(verdict, label) {
  const grade = verdict.grades[label];
  if (!grade) return verdict;
  const tiers = verdict.tiers[grade].map((tier) => [...tier]);
  const place = tiers.findIndex((tier) => tier.includes(label));
  if (tiers[place].length > 1) {
    tiers[place] = tiers[place].filter((other) => other !== label);
    tiers.splice(place + 1, 0, [label]);
  } else {
    if (place === 0) return verdict;
    tiers[place - 1] = [...tiers[place - 1], label].sort();
    tiers.splice(place, 1);
  }
  return { ...verdict, tiers: { ...verdict.tiers, [grade]: tiers } };
}

// Puts an answer beside another, and so into its grade: "above", "below" (all that are equal to it) or "equal".
export function place(verdict, label, where, other) {
  const grade = verdict.grades[other];
  if (!grade || label === other) return verdict;
  const made = without(verdict, label);
  const tiers = made.tiers[grade].map((tier) => [...tier]);
  const found = tiers.findIndex((tier) => tier.includes(other));
  if (where === "equal") tiers[found] = [...tiers[found], label].sort();
  else tiers.splice(where === "above" ? found : found + 1, 0, [label]);
  return { ...made, grades: { ...made.grades, [label]: grade }, tiers: { ...made.tiers, [grade]: tiers } };
}

export function flag(verdict, label, name) {
  const had = verdict.flags[label] ?? [];
  const flags = had.includes(name) ? had.filter((other) => other !== name) : [...had, name];
  return { ...verdict, flags: { ...verdict.flags, [label]: flags } };
}

export const callAllWrong = (verdict) => ({ ...verdict, allWrong: !verdict.allWrong });
export const goTo = (verdict, step) => ({ ...verdict, step });
export const numRanked = (verdict) => Object.keys(verdict.grades).length;
export const canHandIn = (verdict) => verdict.allWrong || numRanked(verdict) >= 2;

// The place of an answer among all: 1 for the best; and whether others share it.
export function rankOf(verdict, label) {
  let above = 0;
  for (const tier of GRADES.flatMap((grade) => verdict.tiers[grade])) {
    if (tier.includes(label)) return { rank: above + 1, shared: tier.length > 1 };
    above += tier.length;
  }
  return null;
}

function without(verdict, label) {
  const grades = { ...verdict.grades };
  const grade = grades[label];
  if (!grade) return verdict;
  delete grades[label];
  const tiers = verdict.tiers[grade].map((tier) => tier.filter((other) => other !== label));
  return { ...verdict, grades, tiers: { ...verdict.tiers, [grade]: tiers.filter((tier) => tier.length) } };
}
