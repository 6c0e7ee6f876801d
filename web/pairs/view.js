// The section "Image pairs": the sets, or the page of one.

import { PairClient } from "./client.js";
import { SetList } from "./set_list.js";
import { SetPage } from "./set_page.js";

/**
 * @param id of the set to show; null for the list.
 * @param go (id) => shows another place of this section.
 * @returns {{element: HTMLElement, destroy: () => void, name?: HTMLElement}}
 */
export function createPairsView({ app, api, t, id, go }) {
  const client = new PairClient(api);
  if (id === null) return new SetList({ client, t, open: go });
  return new SetPage({ app, api, client, t, id, leave: () => go(null) });
}
