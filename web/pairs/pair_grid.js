// A virtualized grid of pairs: only visible cards are in the page, so thousands scroll smoothly.

import { build } from "../elements.js";

export const CARD_HEIGHT = 336; // px, the gap included; --qel-pair-height in the style sheet
const MIN_CARD_WIDTH = 290; // px
const OVERSCAN = 1; // rows above and below the visible ones

/**
 * @param createCard () => {element, update(pair, state)}, which shows one pair after another.
 * @param getState (pair) => what a card shows besides the pair.
 * @param onshow called with the visible pairs when they change.
 */
export function createPairGrid({ label, createCard, getState, onshow }) {
  const spacer = build("div", { class: "qel-grid-spacer", role: "presentation" });
  const element = build("div", { class: "qel-grid", role: "list", "aria-label": label }, spacer);
  let pairs = [];
  /** Id -> place in `pairs`. */
  let places = new Map();
  /** Id -> card of the pairs in the page. */
  let cards = new Map();
  let shownIds = "";

  const countColumns = () => Math.max(1, Math.floor(element.clientWidth / MIN_CARD_WIDTH));

  function draw() {
    const columns = countColumns();
    const height = element.clientHeight || 600;
    const first = Math.max(0, Math.floor(element.scrollTop / CARD_HEIGHT) - OVERSCAN) * columns;
    const rows = Math.ceil(height / CARD_HEIGHT) + 1 + 2 * OVERSCAN;
    const visible = pairs.slice(first, first + rows * columns);
    const shown = new Map();
    const visibleIds = new Set(visible.map(({ id }) => id));
    const spare = [];
    for (const [id, card] of cards) {
      if (visibleIds.has(id)) continue;
      // A caption in which someone types stays, wherever the list is scrolled to.
      if (card.element.contains(document.activeElement) && places.has(id)) shown.set(id, card);
      else spare.push(card);
    }
    visible.forEach((pair, i) => {
      const card = cards.get(pair.id) ?? spare.pop() ?? createCard();
      shown.set(pair.id, card);
      place(card.element, first + i, columns);
      card.update(pair, getState(pair));
    });
    for (const card of spare) card.element.remove();
    // In the order of the list, which is that of the tab key.
    let next = spacer.firstElementChild;
    const ordered = [...shown].sort(([a], [b]) => places.get(a) - places.get(b));
    for (const [, { element: card }] of ordered) {
      if (card === next) next = next.nextElementSibling;
      else spacer.insertBefore(card, next);
    }
    cards = shown;
    spacer.style.height = `${Math.ceil(pairs.length / columns) * CARD_HEIGHT}px`;
    const ids = visible.map((pair) => pair.id).join();
    if (ids !== shownIds) onshow(visible);
    shownIds = ids;
  }

  function place(card, index, columns) {
    const width = 100 / columns;
    const row = Math.floor(index / columns);
    card.style.top = `${row * CARD_HEIGHT}px`;
    card.style.left = `${(index % columns) * width}%`;
    card.style.width = `calc(${width}% - 8px)`;
    card.setAttribute("aria-setsize", pairs.length);
    card.setAttribute("aria-posinset", index + 1);
  }

  function reveal(index) {
    const top = Math.floor(index / countColumns()) * CARD_HEIGHT;
    const bottom = top + CARD_HEIGHT - element.clientHeight;
    if (top < element.scrollTop) element.scrollTop = top;
    else if (bottom > element.scrollTop) element.scrollTop = Math.min(top, bottom);
  }

  element.addEventListener("scroll", draw, { passive: true });
  const observer = new ResizeObserver(draw);
  observer.observe(element);

  return {
    element,
    show(newPairs) {
      pairs = newPairs;
      places = new Map(pairs.map(({ id }, index) => [id, index]));
      draw();
    },
    /** In the order shown. */
    get pairs() {
      return pairs;
    },
    /** {pairId, slot} of the card with the focus, and of the side that has it; else undefined. */
    findFocused() {
      const focused = document.activeElement;
      const found = [...cards].find(([, card]) => card.element.contains(focused));
      return found && { pairId: found[0], slot: focused.dataset.slot };
    },
    get visible() {
      return pairs.filter(({ id }) => cards.has(id));
    },
    /** Draws one pair again, if it is visible. */
    refresh(pair) {
      cards.get(pair.id)?.update(pair, getState(pair));
    },
    focusCaption(pair) {
      if (!places.has(pair.id)) return;
      reveal(places.get(pair.id));
      draw();
      cards.get(pair.id)?.focusCaption();
    },
    destroy: () => observer.disconnect(),
  };
}
