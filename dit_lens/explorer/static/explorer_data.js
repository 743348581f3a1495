// The data of the explorer, as view_arrays.py describes it: once in the browser, moving a slider only slices arrays.
// Letters: l block, e image with maps, s step, g group of channels, k channel of a group, n token.

const NO_CLUSTER = 255, NEIGHBOURS = 6;

const shortName = site => site.replace(/^blocks\.(\d+)\.img$/, '$1');
const threeDigits = value => Number.isFinite(value) ? String(+value.toPrecision(3)) : '–';
const unite = ranges => ranges.reduce(([a, b], [low, high]) => [Number.isFinite(low) ? Math.min(a, low) : a, Number.isFinite(high) ? Math.max(b, high) : b], [Infinity, -Infinity]);

// All data of an explorer. Arrays are one-dimensional; indices are in the order of their letters.
class ExplorerData {
  constructor(model, changed) {
    this.model = model;
    Object.assign(this, model.get('data_info'));
    [this.h, this.w] = this.grid;
    [this.th, this.tw] = this.thumb;
    this.tokens = this.h * this.w;
    this.K = this.groupSize;
    this.channels = numbers(Int32Array, model.get('data_channels'));
    this.ranges = numbers(Float32Array, model.get('data_ranges'));
    this.means = numbers(Float32Array, model.get('data_means'));
    this.scores = numbers(Float32Array, model.get('data_scores'));
    this.thumbs = bytes(model.get('data_thumbs'));
    // All blocks, if they were sent at once, and blocks that arrived one by one.
    this.complete = { maps: bytes(model.get('data_maps')), labels: bytes(model.get('data_labels')) };
    this.received = { maps: new Map(), labels: new Map(), channel: new Map() };
    this.requested = new Set();
    this.spans = new Map();
    model.on('msg:custom', (message, buffers) => {
      const value = bytes(buffers[0]);
      this.received[message.kind].set(message.block, message.kind === 'channel' ? this.splitChannel(value) : value);
      if (this.requested.has(message.kind + message.block)) changed();
    });
  }

  at(l, e, s, g, k) { return (((l * this.mappedImages + e) * this.steps.length + s) * this.groups.length + g) * this.K + k; }
  range(l, e, s, g, k) { const { ranges, i } = this.find(l, e, s, g, k); return [ranges[2 * i], ranges[2 * i + 1]]; }
  mean(l, e, s, g, k) { const { means, i } = this.find(l, e, s, g, k); return means[i]; }

  // The number of a channel; k = K is the one outside of the groups that is shown, if there is one.
  channel(l, g, k) { return k < this.K ? this.channels[(l * this.groups.length + g) * this.K + k] : this.other?.number ?? -1; }
  name(g, channel) { return this.labelled[this.groups[g]]?.[channel] ?? `channel ${channel}`; }
  rankOf(l, g, channel) {
    for (let k = 0; k < this.K; k++) if (this.channel(l, g, k) === channel) return k;
    return -1;
  }

  // The arrays that have a map's range, mean and thumbnail, and its index in them.
  find(l, e, s, g, k) {
    return k < this.K ? { ranges: this.ranges, means: this.means, thumbs: this.thumbs, i: this.at(l, e, s, g, k) }
      : { ...this.other, i: (l * this.mappedImages + e) * this.steps.length + s };
  }

  // What Python sends of a channel outside of the groups: ranges, means, thumbnails and maps of [l, e, s].
  splitChannel(value) {
    const count = this.blocks.length * this.mappedImages * this.steps.length, small = count * this.th * this.tw;
    return {
      ranges: numbers(Float32Array, value.subarray(0, 8 * count)), means: numbers(Float32Array, value.subarray(8 * count, 12 * count)),
      thumbs: value.subarray(12 * count, 12 * count + small), maps: value.subarray(12 * count + small),
    };
  }

  // Chooses the channel outside of the groups. Returns whether its arrays are there; if not, requests them.
  chooseOther(number) {
    const found = this.received.channel.get(number);
    if (found) this.other = { number, ...found };
    else if (this.isReadable(number)) this.request('channel', number);
    return Boolean(found);
  }

  isReadable(number) { return this.model.alone ? this.kept.includes(number) : number >= 0 && number < this.width; }

  request(kind, block) {
    if (this.requested.has(kind + block)) return;
    this.requested.add(kind + block);
    this.model.send({ kind, block });
  }

  // The maps or labels of a block. Without them, requests them from Python, which answers later.
  block(kind, l) {
    if (this.complete[kind].length) {
      const length = this.complete[kind].length / this.blocks.length;
      return this.complete[kind].subarray(l * length, (l + 1) * length);
    }
    const found = this.received[kind].get(l);
    if (!found && l >= 0 && l < this.blocks.length) this.request(kind, l);
    return found;
  }

  map(l, e, s, g, k) {
    if (k === this.K) {
      const start = this.find(l, e, s, g, k).i * this.tokens;
      return this.other?.maps.subarray(start, start + this.tokens) ?? null;
    }
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

  // The values of all tokens; null if there is no such map, or not yet.
  values(l, e, s, g, k) {
    const [low, high] = this.range(l, e, s, g, k), map = Number.isFinite(low) ? this.map(l, e, s, g, k) : null;
    return map && this.toValues(map, low, high);
  }

  // What bytes mean; a loop, as it is for every token of every map that is drawn.
  toValues(map, low, high) {
    const values = new Float32Array(map.length), gain = (high - low) / 255;
    for (let n = 0; n < map.length; n++) values[n] = low + gain * map[n];
    return values;
  }

  value(l, e, s, g, k, n) {
    const map = this.map(l, e, s, g, k), [low, high] = this.range(l, e, s, g, k);
    return map ? low + (high - low) * map[n] / 255 : NaN;
  }

  thumbValues(l, e, s, g, k) {
    const { thumbs, i } = this.find(l, e, s, g, k), [low, high] = this.range(l, e, s, g, k), size = this.th * this.tw;
    return this.toValues(thumbs.subarray(i * size, (i + 1) * size), low, high);
  }

  // Smallest and largest value of a channel over all steps and images of a block.
  span(l, g, k) {
    const key = k < this.K ? `${l} ${g} ${k}` : `${l} other ${this.other?.number}`;
    if (!this.spans.has(key)) {
      const ranges = [];
      for (let e = 0; e < this.mappedImages; e++) for (let s = 0; s < this.steps.length; s++) ranges.push(this.range(l, e, s, g, k));
      this.spans.set(key, unite(ranges));
    }
    return this.spans.get(key);
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
