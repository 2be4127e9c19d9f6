// A mouse may carry a card to another: onto its upper part, its lower part, or its middle, which makes them equal.
const SHARE = 0.3; // of a card's height, at either end

export function letDrag(place, drop) {
  let carried = null;
  place.addEventListener("dragstart", (event) => {
    const card = event.target.closest?.(".card[draggable=true]");
    if (!card) return;
    carried = card.dataset.label;
    event.dataTransfer.setData("text/plain", carried);
    event.dataTransfer.effectAllowed = "move";
  });
  place.addEventListener("dragover", (event) => {
    const card = event.target.closest(".card[data-grade]:not([data-grade=''])");
    if (!carried || !card || card.dataset.label === carried) return;
    event.preventDefault();
    mark(place, card, whereOn(card, event.clientY));
  });
  place.addEventListener("drop", (event) => {
    const card = event.target.closest(".card");
    if (!carried || !card) return;
    event.preventDefault();
    const [label, other, where] = [carried, card.dataset.label, whereOn(card, event.clientY)];
    carried = null;
    mark(place, null);
    drop(label, where, other);
  });
  place.addEventListener("dragend", () => {
    carried = null;
    mark(place, null);
  });
}

function whereOn(card, y) {
  const box = card.getBoundingClientRect();
  const part = (y - box.top) / box.height;
  return part < SHARE ? "above" : part > 1 - SHARE ? "below" : "equal";
}

function mark(place, card, where) {
  for (const other of place.querySelectorAll("[data-drop]")) if (other !== card) delete other.dataset.drop;
  if (card) card.dataset.drop = where;
}
