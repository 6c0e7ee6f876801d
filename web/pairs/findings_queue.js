// What the check says about the visible pairs: asked for a few at a time, kept while they are equal.

const DELAY = 200; // ms that pairs stay visible before the server decodes their images
const NUM_REQUESTS = 2; // at the same time

export class FindingsQueue {
  /** @param onnews called with a pair whose findings came. */
  constructor(client, setId, onnews) {
    Object.assign(this, { client, setId, onnews });
    /** Pair id -> {key, found}. */
    this.known = new Map();
    this.wanted = [];
    this.numRunning = 0;
    this.isStopped = false;
  }

  /** The findings of a pair as it is now; undefined until they came. */
  get(pair) {
    const known = this.known.get(pair.id);
    return known?.key === makeKey(pair) ? known.found : undefined;
  }

  /** Asks for the findings of these pairs; earlier ones that are not visible any more can wait. */
  want(pairs) {
    this.wanted = pairs.filter((pair) => this.get(pair) === undefined);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.run(), DELAY);
  }

  /** Asks for those of one pair that was changed, before all others. */
  again(pair) {
    this.wanted = [pair, ...this.wanted.filter(({ id }) => id !== pair.id)];
    this.run();
  }

  stop() {
    this.isStopped = true;
    clearTimeout(this.timer);
  }

  run() {
    while (!this.isStopped && this.numRunning < NUM_REQUESTS && this.wanted.length) {
      this.numRunning += 1;
      this.ask(this.wanted.shift()).finally(() => {
        this.numRunning -= 1;
        this.run();
      });
    }
  }

  async ask(pair) {
    let found;
    try {
      found = await this.client.listFindings(this.setId, pair.id);
    } catch {
      return; // the pair was removed meanwhile
    }
    this.known.set(pair.id, { key: makeKey(pair), found });
    if (!this.isStopped) this.onnews(pair);
  }
}

function makeKey({ target, references, mask, caption }) {
  const images = [target, ...references, mask];
  return JSON.stringify([images.map((one) => one?.version), caption]);
}
