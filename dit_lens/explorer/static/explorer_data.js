// The data of the explorer, as views.py describes it: once in the browser, moving a slider only slices arrays.
// Letters: l block, e image with maps, s step, g group of channels, k channel of a group, n token.

const NO_CLUSTER = 255, NEIGHBOURS = 6;

const shortName = site => site.replace(/^blocks\.(\d+)\.img$/, '$1');
const threeDigits = value => Number.isFinite(value) ? String(+value.toPrecision(3)) : '–';

// All data of an explorer. Arrays are one-dimensional; indices are in the order of their letters.
class ExplorerData {
  constructor(model, changed) {
    this.model = model;
    Object.assign(this, model.get('data_info'));
    [this.h, this.w] = this.grid;
    this.tokens = this.h * this.w;
    this.K = this.groupSize;
    this.channels = numbers(Int32Array, model.get('data_channels'));
    this.ranges = numbers(Float32Array, model.get('data_ranges'));
    this.means = numbers(Float32Array, model.get('data_means'));
    this.scores = numbers(Float32Array, model.get('data_scores'));
    this.thumbs = bytes(model.get('data_thumbs'));
    // All blocks, if they were sent at once, and blocks that arrived one by one.
    this.complete = { maps: bytes(model.get('data_maps')), labels: bytes(model.get('data_labels')) };
    this.received = { maps: new Map(), labels: new Map() };
    this.requested = new Set();
    model.on('msg:custom', (message, buffers) => {
      this.received[message.kind].set(message.block, bytes(buffers[0]));
      if (this.requested.has(message.kind + message.block)) changed();
    });
  }

  at(l, e, s, g, k) { return (((l * this.mappedImages + e) * this.steps.length + s) * this.groups.length + g) * this.K + k; }
  channel(l, g, k) { return this.channels[(l * this.groups.length + g) * this.K + k]; }
  range(l, e, s, g, k) { const i = 2 * this.at(l, e, s, g, k); return [this.ranges[i], this.ranges[i + 1]]; }
  mean(l, e, s, g, k) { return this.means[this.at(l, e, s, g, k)]; }

  // The maps or labels of a block. Without them, requests them from Python, which answers later.
  block(kind, l) {
    if (this.complete[kind].length) {
      const length = this.complete[kind].length / this.blocks.length;
      return this.complete[kind].subarray(l * length, (l + 1) * length);
    }
    const found = this.received[kind].get(l);
    if (!found && l >= 0 && l < this.blocks.length && !this.requested.has(kind + l)) {
      this.requested.add(kind + l);
      this.model.send({ kind, block: l });
    }
    return found;
  }

  map(l, e, s, g, k) {
    const block = this.block('maps', l);
    if (!block) return null;
    // Requests the neighbouring blocks too, which are likely to be next.
    this.block('maps', l + 1); this.block('maps', l - 1);
    const start = this.at(0, e, s, g, k) * this.tokens;
    return block.subarray(start, start + this.tokens);
  }

  labels(l, e, s, g) {
    const block = this.block('labels', l);
    if (!block) return null;
    const start = ((e * this.steps.length + s) * this.groups.length + g) * this.tokens;
    return block.subarray(start, start + this.tokens);
  }

  value(l, e, s, g, k, n) {
    const map = this.map(l, e, s, g, k), [low, high] = this.range(l, e, s, g, k);
    return map ? low + (high - low) * map[n] / 255 : NaN;
  }

  // Smallest and largest value of a channel over all steps and images of a block.
  span(l, g, k) {
    let low = Infinity, high = -Infinity;
    for (let e = 0; e < this.mappedImages; e++) for (let s = 0; s < this.steps.length; s++) {
      const [a, b] = this.range(l, e, s, g, k);
      if (a < low) low = a;
      if (b > high) high = b;
    }
    return [low, high];
  }

  // The tokens with the smallest Euclidean distance to token n, in the scaled maps of the group's channels.
  neighbours(l, e, s, g, n) {
    const maps = [];
    for (let k = 0; k < this.K; k++) {
      const map = this.channel(l, g, k) >= 0 && this.map(l, e, s, g, k);
      if (map) maps.push(map);
    }
    const distance = new Float32Array(this.tokens);
    for (const map of maps) for (let m = 0; m < distance.length; m++) distance[m] += (map[m] - map[n]) ** 2;
    distance[n] = Infinity;
    return maps.length ? [...distance.keys()].sort((a, b) => distance[a] - distance[b]).slice(0, Math.min(NEIGHBOURS, this.tokens - 1)) : [];
  }
}
