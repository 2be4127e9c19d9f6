// Keys: what each does, and which are listened to.
const KEY = "tenfold-single-keys";

// Letters name answers first; with Shift, or where no answer has the letter, they are commands.
export const COMMANDS = {
  U: "unsafe", T: "untrue", O: "off_question", X: "broken",
  V: "compare", N: "next", Q: "previous", S: "skip", W: "all_wrong", Z: "undo", Y: "redo",
  R: "back", M: "as_text", L: "guidelines", K: "keys", P: "progress",
};

export const LIST = [
  ["A–Z", "key_letter"], ["1 2 3 4", "key_grades"], ["0", "key_ungrade"], ["← →", "key_sides"], ["↑ ↓", "key_move"],
  ["=", "key_tie"], ["Enter", "key_enter"], ["V", "key_compare"], ["U", "key_unsafe"], ["T", "key_untrue"],
  ["O", "key_off_question"], ["X", "key_broken"], ["N", "key_next"], ["Q", "key_previous"], ["W", "all_wrong"], ["S", "skip"],
  ["Z  Ctrl Z", "undo"], ["Y  Ctrl Y", "redo"], ["R", "key_back"], ["M", "as_text"], ["L", "guidelines"], ["P", "progress"],
  ["K  ?", "keys"], ["Esc", "key_close"],
];

export function singleKeys() {
  try { return localStorage.getItem(KEY) !== "off"; } catch { return true; }
}

export function setSingleKeys(on) {
  try { localStorage.setItem(KEY, on ? "on" : "off"); } catch { /* on again next time */ }
}

// `does` maps names of commands to functions; `labels()` are those of the answers; `go(label)` goes to one.
export function listen(does, labels, go) {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || isWriting(event.target) || document.querySelector("dialog[open]")) return;
    const name = commandOf(event, labels());
    if (!name) return;
    const done = name.label ? go(name.label) : does[name.command]?.(name.value, event);
    if (done !== false) event.preventDefault();
  });
}

function commandOf(event, labels) {
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "Z") return { command: event.shiftKey ? "redo" : "undo" };
    return key === "Y" ? { command: "redo" } : null;
  }
  if (event.altKey || !singleKeys()) return null;
  if (!event.shiftKey && labels.includes(key)) return { label: key };
  if (key === "?") return { command: "keys" };
  if ("1234".includes(key)) return { command: "grade", value: Number(key) - 1 };
  if (key === "0") return { command: "ungrade" };
  if (key === "=") return { command: "tie" };
  const onCard = event.target.classList?.contains("card");
  if (onCard && key === "Enter") return { command: "expand" };
  if (onCard && (key === "ArrowLeft" || key === "ArrowRight")) return { command: "side", value: key === "ArrowLeft" ? -1 : 1 };
  if (onCard && (key === "ArrowUp" || key === "ArrowDown")) return { command: "move", value: key === "ArrowUp" ? -1 : 1 };
  return COMMANDS[key] ? { command: COMMANDS[key] } : null;
}

function isWriting(element) {
  return element.matches?.("input:not([type=radio]):not([type=checkbox]), textarea, select") ?? false;
}
