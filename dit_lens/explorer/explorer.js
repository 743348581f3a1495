// The explorer: images under maps of channels or clusters. All arrays are in the browser; a slider only slices them.
// Letters as in views.py: l block, e image with values, s step, g group, k channel of a group, n token.

const ACCENT = '#D55E00', STATE = ['left', 'right', 'step', 'site', 'group', 'channel', 'overlay', 'palette', 'scale', 'opacity', 'token'];
const NONE = 255, PIN = '#ffffff', EDGE = '#000000', NEIGHBOURS = 6;

class Arrays {
  constructor(model, changed) {
    this.model = model;
    Object.assign(this, model.get('_meta'));
    [this.h, this.w] = this.grid;
    this.tokens = this.h * this.w;
    this.K = this.size;
    this.channels = numbers(Int32Array, model.get('_channels'));
    this.ranges = numbers(Float32Array, model.get('_ranges'));
    this.means = numbers(Float32Array, model.get('_means'));
    this.scores = numbers(Float32Array, model.get('_scores'));
    this.thumbs = bytes(model.get('_thumbs'));
    this.whole = { maps: bytes(model.get('_maps')), labels: bytes(model.get('_labels')) };
    this.held = { maps: new Map(), labels: new Map() };
    this.asked = new Set();
    model.on('msg:custom', (message, buffers) => {
      this.held[message.kind].set(message.block, bytes(buffers[0]));
      changed();
    });
  }

  at(l, e, s, g, k) { return (((l * this.values + e) * this.steps.length + s) * this.groups.length + g) * this.K + k; }
  channel(l, g, k) { return this.channels[(l * this.groups.length + g) * this.K + k]; }
  range(l, e, s, g, k) { const i = 2 * this.at(l, e, s, g, k); return [this.ranges[i], this.ranges[i + 1]]; }
  mean(l, e, s, g, k) { return this.means[this.at(l, e, s, g, k)]; }

  // A block of maps or labels: there from the start, or asked of Python, which answers later.
  block(kind, l) {
    if (this.whole[kind].length) {
      const length = this.whole[kind].length / this.blocks.length;
      return this.whole[kind].subarray(l * length, (l + 1) * length);
    }
    const found = this.held[kind].get(l);
    if (!found && l >= 0 && l < this.blocks.length && !this.asked.has(kind + l)) {
      this.asked.add(kind + l);
      this.model.send({ kind, block: l });
    }
    return found;
  }

  map(l, e, s, g, k) {
    const block = this.block('maps', l);
    if (!block) return null;
    // The neighbours come before they are wanted.
    this.block('maps', l + 1); this.block('maps', l - 1);
    const place = this.at(0, e, s, g, k) * this.tokens;
    return block.subarray(place, place + this.tokens);
  }

  labels(l, e, s, g) {
    const block = this.block('labels', l);
    if (!block) return null;
    const place = ((e * this.steps.length + s) * this.groups.length + g) * this.tokens;
    return block.subarray(place, place + this.tokens);
  }

  value(l, e, s, g, k, n) {
    const map = this.map(l, e, s, g, k), [low, high] = this.range(l, e, s, g, k);
    return map ? low + (high - low) * map[n] / 255 : NaN;
  }

  // The same channel over all steps and images of a block.
  span(l, g, k) {
    let low = Infinity, high = -Infinity;
    for (let e = 0; e < this.values; e++) for (let s = 0; s < this.steps.length; s++) {
      const [a, b] = this.range(l, e, s, g, k);
      if (a < low) low = a;
      if (b > high) high = b;
    }
    return [low, high];
  }

  // Tokens whose normalised channels are nearest to those of token n.
  neighbours(l, e, s, g, n) {
    const maps = [];
    for (let k = 0; k < this.K; k++) {
      const map = this.channel(l, g, k) >= 0 && this.map(l, e, s, g, k);
      if (map) maps.push(map);
    }
    const far = new Float32Array(this.tokens);
    for (const map of maps) for (let m = 0; m < far.length; m++) far[m] += (map[m] - map[n]) ** 2;
    far[n] = Infinity;
    return maps.length ? [...far.keys()].sort((a, b) => far[a] - far[b]).slice(0, Math.min(NEIGHBOURS, this.tokens - 1)) : [];
  }
}

// 256 colours between the anchors of a palette.
function tableOf(anchors) {
  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const place = i / 255 * (anchors.length - 1), a = Math.min(Math.floor(place), anchors.length - 2), t = place - a;
    for (let c = 0; c < 3; c++) table[3 * i + c] = Math.round(anchors[a][c] * (1 - t) + anchors[a + 1][c] * t);
  }
  return table;
}

const shortName = site => site.replace(/^blocks\.(\d+)\.img$/, '$1');
const figure3 = value => Number.isFinite(value) ? String(+value.toPrecision(3)) : '–';

// One image with its overlay.
class Pane {
  constructor(arrays, side, pin) {
    this.arrays = arrays;
    this.canvas = make('canvas', { tabIndex: 0, role: 'img' });
    this.canvas.dataset.side = side;
    this.context = this.canvas.getContext('2d');
    this.small = make('canvas', { width: arrays.w, height: arrays.h });
    this.pixels = this.small.getContext('2d').createImageData(arrays.w, arrays.h);
    this.caption = make('figcaption');
    this.node = make('figure', {}, this.canvas, this.caption);
    this.canvas.addEventListener('pointermove', event => pin(this.tokenAt(event), false));
    this.canvas.addEventListener('pointerleave', () => pin(-1, false));
    this.canvas.addEventListener('click', event => pin(this.tokenAt(event), true));
    this.canvas.addEventListener('keydown', event => this.key(event, pin));
  }

  tokenAt(event) {
    const { w, h } = this.arrays, box = this.canvas.getBoundingClientRect();
    const x = clamp(Math.floor((event.clientX - box.left) / box.width * w), 0, w - 1);
    return clamp(Math.floor((event.clientY - box.top) / box.height * h), 0, h - 1) * w + x;
  }

  key(event, pin) {
    const { w, h } = this.arrays, n = Math.max(0, this.pinned);
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) {
      const from = this.pinned < 0 ? Math.floor(h / 2) * w + Math.floor(w / 2) : n;
      pin(clamp(Math.floor(from / w) + move[1], 0, h - 1) * w + clamp(from % w + move[0], 0, w - 1), true);
    } else if (event.key === 'Escape') pin(-1, true);
    else return;
    event.preventDefault();
  }

  fit(image) {
    const { w, h } = this.arrays, width = 384 * Math.ceil(devicePixelRatio || 1);
    const height = Math.round(image ? width * image.height / image.width : width * h / w);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
  }

  draw(image, overlay, opacity, marks) {
    const { context, canvas } = this;
    this.fit(image);
    context.globalAlpha = 1;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (image) {
      context.imageSmoothingEnabled = image.width > 128;
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
    }
    if (overlay) {
      overlay(this.pixels.data);
      this.small.getContext('2d').putImageData(this.pixels, 0, 0);
      context.globalAlpha = image ? opacity : 1;
      context.imageSmoothingEnabled = false;
      context.drawImage(this.small, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
    }
    this.pinned = marks.pinned;
    for (const n of marks.near) this.mark(n, 1);
    if (marks.token >= 0) this.mark(marks.token, 3);
  }

  mark(n, width) {
    const { w, h } = this.arrays, { context, canvas } = this, dx = canvas.width / w, dy = canvas.height / h;
    const scale = canvas.width / 384;
    for (const [colour, extra] of [[EDGE, 2], [PIN, 0]]) {
      context.strokeStyle = colour;
      context.lineWidth = (width + extra) * scale;
      context.strokeRect((n % w) * dx, Math.floor(n / w) * dy, dx, dy);
    }
  }
}

// All blocks and steps at a glance; a click jumps there.
class Atlas {
  constructor(arrays, jump) {
    this.arrays = arrays;
    [this.th, this.tw] = arrays.thumb;
    this.canvas = make('canvas', { tabIndex: 0, role: 'img' });
    this.base = make('canvas', { width: arrays.steps.length * this.tw, height: arrays.blocks.length * this.th });
    const across = clamp(Math.floor(560 / arrays.steps.length), 6, 28);
    this.cell = [across, clamp(Math.round(across * this.th / this.tw), 6, 28)];
    this.gutter = 34;
    const [cw, ch] = this.cell;
    this.size = [this.gutter + cw * arrays.steps.length + 2, ch * arrays.blocks.length + 20];
    this.canvas.style.width = `${this.size[0]}px`;
    this.cursor = make('i', { className: 'cursor' });
    Object.assign(this.cursor.style, { width: `${cw}px`, height: `${ch}px` });
    this.node = make('div', { className: 'atlas' }, this.canvas, this.cursor);
    this.canvas.addEventListener('click', event => jump(...this.cellAt(event)));
    this.canvas.addEventListener('pointermove', event => {
      const [l, s] = this.cellAt(event);
      this.canvas.title = `${arrays.blocks[l]}, step ${arrays.steps[s][0]}`;
    });
    this.canvas.addEventListener('keydown', event => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      jump(clamp(this.l + move[0], 0, arrays.blocks.length - 1), clamp(this.s + move[1], 0, arrays.steps.length - 1));
      event.preventDefault();
    });
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), scale = this.size[0] / box.width;
    const x = (event.clientX - box.left) * scale - this.gutter, y = (event.clientY - box.top) * scale;
    return [
      clamp(Math.floor(y / this.cell[1]), 0, this.arrays.blocks.length - 1),
      clamp(Math.floor(x / this.cell[0]), 0, this.arrays.steps.length - 1),
    ];
  }

  paint(e, g, k, palette, table, ink) {
    const key = `${e} ${g} ${k} ${palette} ${ink}`;
    if (key === this.key) return;
    this.key = key;
    const { arrays, th, tw } = this, columns = arrays.steps.length * tw;
    const context = this.base.getContext('2d'), pixels = context.createImageData(columns, this.base.height);
    for (let l = 0; l < arrays.blocks.length; l++) for (let s = 0; s < arrays.steps.length; s++) {
      const place = arrays.at(l, e, s, g, k) * th * tw, there = arrays.channel(l, g, k) >= 0;
      for (let i = 0; i < th * tw; i++) {
        const value = 3 * arrays.thumbs[place + i];
        const p = 4 * ((l * th + Math.floor(i / tw)) * columns + s * tw + i % tw);
        pixels.data[p] = table[value]; pixels.data[p + 1] = table[value + 1]; pixels.data[p + 2] = table[value + 2];
        pixels.data[p + 3] = there ? 255 : 0;
      }
    }
    context.putImageData(pixels, 0, 0);
    this.label(ink);
  }

  // The thumbnails, enlarged, with numbers of blocks and steps.
  label(ink) {
    const { arrays, canvas, gutter } = this, [cw, ch] = this.cell, scale = Math.ceil(devicePixelRatio || 1);
    const [width, height] = this.size, across = arrays.steps.length, down = arrays.blocks.length;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.base, gutter, 0, cw * across, ch * down);
    Object.assign(context, { fillStyle: ink, font: '10px system-ui, sans-serif', textAlign: 'right', textBaseline: 'middle' });
    const every = Math.ceil(11 / ch), along = Math.ceil(18 / cw);
    for (let l = 0; l < down; l += every) context.fillText(shortName(arrays.blocks[l]).slice(-6), gutter - 4, (l + 0.5) * ch);
    context.textAlign = 'center';
    for (let s = 0; s < across; s += along) context.fillText(arrays.steps[s][0], gutter + (s + 0.5) * cw, ch * down + 11);
  }

  point(l, s) {
    Object.assign(this, { l, s });
    this.cursor.style.transform = `translate(${this.gutter + s * this.cell[0]}px, ${l * this.cell[1]}px)`;
    this.canvas.setAttribute('aria-label', `All blocks and steps; at ${this.arrays.blocks[l]}, step ${this.arrays.steps[s][0]}. Arrow keys move.`);
  }
}

// The score of every channel of a block, by rank, both axes logarithmic; the shown group is marked.
class Spectrum {
  constructor(arrays) {
    this.arrays = arrays;
    this.width = arrays.blocks.length ? arrays.scores.length / arrays.blocks.length : 0;
    this.canvas = make('canvas', { width: 760, height: 260, role: 'img', className: 'spectrum' });
    let low = Infinity, high = 0;
    for (const score of arrays.scores) if (score > 0) { low = Math.min(low, score); high = Math.max(high, score); }
    Object.assign(this, { low, high });
  }

  draw(l, g, chosen, ink, accent) {
    const { arrays, width, canvas } = this, context = canvas.getContext('2d');
    const scores = arrays.scores.subarray(l * width, (l + 1) * width);
    const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]), rank = new Map(order.map((c, i) => [c, i]));
    const x = i => 84 + (canvas.width - 104) * Math.log(i + 1) / Math.log(width);
    const y = v => 14 + (canvas.height - 56) * (1 - Math.log(Math.max(v, this.low) / this.low) / Math.log(this.high / this.low || 10));
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.strokeStyle = context.fillStyle = ink;
    context.font = '20px system-ui, sans-serif';
    context.lineWidth = 2;
    context.beginPath();
    order.forEach((c, i) => context.lineTo(x(i), y(scores[c])));
    context.stroke();
    context.textAlign = 'right';
    for (const value of [this.high, this.low]) context.fillText(figure3(value), 72, y(value) + 7);
    context.textAlign = 'center';
    for (let i = 1; i <= width; i *= 10) context.fillText(i, x(i - 1), canvas.height - 14);
    for (let k = 0; k < arrays.K; k++) {
      const channel = arrays.channel(l, g, k);
      if (channel < 0) continue;
      context.fillStyle = accent;
      context.globalAlpha = channel === chosen ? 1 : 0.55;
      context.beginPath();
      context.arc(x(rank.get(channel)), y(scores[channel]), channel === chosen ? 9 : 6, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
    canvas.setAttribute('aria-label', `Score of all ${width} channels of ${arrays.blocks[l]} by rank; channel ${chosen} is rank ${rank.get(chosen) + 1}`);
  }
}

// Buttons for a few groups, a list for many.
function groupChoice(arrays, onChoose) {
  const names = arrays.groups.map(name => [name, name]), label = arrays.masks ? 'mask of' : 'group of channels';
  if (names.length <= 6) return toggles(label, names, onChoose);
  const { row, select } = choice(label, names, onChoose);
  return { row, show: name => { select.value = name; } };
}

// The image files, decoded when first wanted.
function album(panes, data, changed) {
  const found = new Map();
  return i => {
    const pane = panes[i];
    if (!pane || !pane.bytes) return null;
    if (!found.has(i)) {
      found.set(i, null);
      const [from, to] = pane.bytes;
      createImageBitmap(new Blob([data.subarray(from, to)], { type: pane.mime })).then(bitmap => { found.set(i, bitmap); changed(); });
    }
    return found.get(i);
  };
}

function render({ model, el }) {
  const arrays = new Arrays(model, () => draw()), get = name => model.get(name), change = stateful(model, STATE, () => draw());
  const hasMaps = arrays.K > 0 && arrays.values > 0, hasLabels = arrays.values > 0, several = arrays.panes.length > 1;
  const images = album(arrays.panes, bytes(get('_images')), () => draw());
  const tables = Object.fromEntries(Object.entries(arrays.palettes).map(([name, anchors]) => [name, tableOf(anchors)]));
  const clusterTable = arrays.cluster_colours;
  let hovered = -1, draws = 0, spectrumKey = '', ink = null;

  const state = () => {
    const l = Math.max(0, arrays.blocks.indexOf(get('site'))), g = Math.max(0, arrays.groups.indexOf(get('group')));
    const s = Math.max(0, arrays.steps.findIndex(([index]) => index === get('step')));
    let k = 0;
    for (let i = 0; i < arrays.K; i++) if (arrays.channel(l, g, i) === get('channel')) k = i;
    return { l, g, s, k };
  };
  // A new block or group keeps the channel where it has it, and otherwise the rank.
  const move = (l, g, others = {}) => {
    const { k } = state();
    const has = [...Array(arrays.K).keys()].some(i => arrays.channel(l, g, i) === get('channel'));
    const channel = arrays.K ? arrays.channel(l, g, k) : -1;
    change({ ...others, site: arrays.blocks[l] ?? '', group: arrays.groups[g] ?? '', ...(has || !hasMaps ? {} : { channel: channel >= 0 ? channel : arrays.channel(l, g, 0) }) });
  };
  const pin = (n, keep) => {
    if (keep) change({ token: n === get('token') ? -1 : n });
    else if (n !== hovered) { hovered = n; draw(); }
  };

  const left = new Pane(arrays, 'left', pin), right = new Pane(arrays, 'right', pin);
  const names = arrays.panes.map((pane, i) => [i, pane.name]);
  const paneChoice = choice('image', names, value => change({ left: +value }));
  const besideChoice = choice('beside it', [[-1, 'nothing'], ...names], value => change({ right: +value }));
  const overlays = toggles('overlay', [...(hasMaps ? [['heat', 'channel']] : []), ...(hasLabels ? [['clusters', arrays.masks ? 'mask' : 'clusters']] : []), ['none', 'image']], overlay => change({ overlay }));
  const palette = choice('colours', Object.keys(arrays.palettes).map(name => [name, name]), value => change({ palette: value }));
  const scale = choice('scale', [['map', 'of this map'], ['steps', 'of all steps']], value => change({ scale: value }));
  const opacity = slider('opacity', { max: 1, step: 0.05, onInput: value => change({ opacity: value }) });
  const steps = slider('step', { max: arrays.steps.length - 1, onInput: s => change({ step: arrays.steps[s][0] }) });
  const blocks = slider('block', { max: arrays.blocks.length - 1, onInput: l => move(l, state().g) });
  const groups = groupChoice(arrays, name => move(state().l, arrays.groups.indexOf(name)));
  const bars = Array.from({ length: arrays.K }, (_, k) => {
    const name = make('span'), bar = make('i'), value = make('b');
    const button = make('button', { type: 'button', className: 'bar', 'aria-pressed': 'false' }, name, make('span', { className: 'track' }, bar), value);
    button.addEventListener('click', () => { const { l, g } = state(); change({ channel: arrays.channel(l, g, k) }); });
    return { button, name, bar, value };
  });
  const legend = make('div', { className: 'legend' });
  const about = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' });
  const atlas = hasMaps ? new Atlas(arrays, (l, s) => move(l, state().g, { step: arrays.steps[s][0] })) : null;
  const spectrum = arrays.scores.length ? new Spectrum(arrays) : null;
  const code = codeBox(() => arrays.code.replace('{state}', stateCode()));

  const stateCode = () => STATE.filter(name => get(name) !== arrays.initial[name]).map(name => `, ${name}=${python(get(name))}`).join('');

  const part = (title, ...nodes) => make('div', { className: 'part' }, make('h4', {}, title), ...nodes);
  const root = frame('dit_lens explorer',
    make('div', { className: 'top' }, ...(several ? [paneChoice.row, besideChoice.row] : []), overlays.row, ...(hasMaps ? [palette.row, scale.row] : [])),
    make('div', { className: 'stage' },
      make('div', { className: 'panes' }, left.node, right.node),
      make('div', { className: 'side' },
        ...(arrays.blocks.length > 1 ? [blocks.row] : []), ...(arrays.steps.length > 1 ? [steps.row] : []), ...(hasLabels ? [opacity.row, groups.row] : []),
        make('div', { className: 'bars' }, ...bars.map(bar => bar.button)), legend, about)),
    make('div', { className: 'below' },
      ...(atlas ? [part('blocks (down) and steps (across)', atlas.node)] : []),
      ...(spectrum ? [part('score |mean| of every channel, by rank', spectrum.canvas)] : [])),
    ...(arrays.note ? [make('p', { className: 'token' }, arrays.note)] : []), code.row);
  el.append(root);

  const heat = (e, { l, s, g, k }) => {
    const map = arrays.map(l, e, s, g, k), table = tables[get('palette')];
    if (!map || arrays.channel(l, g, k) < 0) return null;
    const [low, high] = arrays.range(l, e, s, g, k), [from, to] = get('scale') === 'steps' ? arrays.span(l, g, k) : [low, high];
    const gain = to > from ? (high - low) / (to - from) : 1, shift = to > from ? 255 * (low - from) / (to - from) : 0;
    return data => {
      for (let n = 0, p = 0; n < map.length; n++, p += 4) {
        const v = 3 * Math.round(shift + gain * map[n]);
        data[p] = table[v]; data[p + 1] = table[v + 1]; data[p + 2] = table[v + 2]; data[p + 3] = 255;
      }
    };
  };
  const regions = (e, { l, s, g }) => {
    const labels = arrays.labels(l, e, s, g);
    return labels && (data => {
      for (let n = 0, p = 0; n < labels.length; n++, p += 4) {
        const colour = clusterTable[labels[n] % clusterTable.length];
        data[p] = colour[0]; data[p + 1] = colour[1]; data[p + 2] = colour[2]; data[p + 3] = labels[n] === NONE ? 0 : 255;
      }
    });
  };

  function drawPane(pane, i, view, token) {
    const shown = arrays.panes[i];
    pane.node.hidden = !shown;
    if (!shown) return;
    const e = shown.values, overlay = e === null ? null : { heat, clusters: regions, none: () => null }[get('overlay')](e, view);
    const near = token >= 0 && e !== null && hasMaps ? arrays.neighbours(view.l, e, view.s, view.g, token) : [];
    pane.draw(images(i), overlay, get('opacity'), { token, near, pinned: get('token') });
    pane.caption.textContent = several ? shown.name : '';
    const where = hasLabels ? `, ${arrays.blocks[view.l]}, step ${arrays.steps[view.s][0]}` : '';
    const what = get('overlay') === 'heat' && hasMaps ? `, channel ${arrays.channel(view.l, view.g, view.k)}` : '';
    pane.canvas.setAttribute('aria-label', shown.name + where + what);
  }

  function drawBars({ l, g, s, k }, e, token) {
    let most = 1e-12;
    const values = bars.map((_, i) => token >= 0 ? arrays.value(l, e, s, g, i, token) : arrays.mean(l, e, s, g, i));
    for (const value of values) if (Math.abs(value) > most) most = Math.abs(value);
    bars.forEach((bar, i) => {
      const channel = arrays.channel(l, g, i);
      bar.button.hidden = channel < 0;
      bar.name.textContent = `channel ${channel}`;
      bar.bar.style.width = `${100 * Math.abs(values[i] || 0) / most}%`;
      bar.bar.className = values[i] < 0 ? 'negative' : '';
      bar.value.textContent = figure3(values[i]);
      bar.button.setAttribute('aria-pressed', String(i === k));
    });
  }

  function drawLegend(view, e) {
    const { l, s, g, k } = view;
    if (get('overlay') === 'heat') {
      const [low, high] = get('scale') === 'steps' ? arrays.span(l, g, k) : arrays.range(l, e, s, g, k);
      const stops = arrays.palettes[get('palette')].map(colour => `rgb(${colour})`).join(', ');
      legend.replaceChildren(figure3(low), make('i', { style: `background: linear-gradient(to right, ${stops})` }), figure3(high));
    } else if (get('overlay') === 'clusters') {
      const labels = arrays.labels(l, e, s, g), counts = new Map();
      for (const label of labels ?? []) counts.set(label, (counts.get(label) ?? 0) + 1);
      const names = arrays.masks ? ['outside', 'inside'] : ['coldest', ...(counts.size > 2 ? Array(counts.size - 2).fill('') : []), 'hottest'];
      const known = [...counts].filter(([label]) => label !== NONE).sort();
      legend.replaceChildren(...known.map(([label, count]) => make('span', { className: 'key' },
        make('i', { style: `background: rgb(${clusterTable[label % clusterTable.length]})` }), `${names[label] ?? label}: ${count} tokens`)));
      if (!labels) legend.textContent = 'K-means …';
    } else legend.replaceChildren();
  }

  function drawToken({ l, s, g }, e, token) {
    if (token < 0) { about.textContent = hasMaps ? 'Bars: mean over tokens. Point at a token for its values; click to keep it.' : ''; return; }
    const labels = get('overlay') === 'clusters' && arrays.labels(l, e, s, g), near = hasMaps ? arrays.neighbours(l, e, s, g, token) : [];
    const name = n => `${Math.floor(n / arrays.w)}, ${n % arrays.w}`;
    about.textContent = `Token ${token} (row ${Math.floor(token / arrays.w)}, column ${token % arrays.w})` +
      (labels ? `, ${arrays.masks ? ['outside', 'inside'][labels[token]] ?? 'no mask' : `cluster ${labels[token]}`}` : '') +
      (hasMaps ? `. Bars: its values. Nearest in these channels (row, column): ${near.map(name).join('; ')}.` : '.');
  }

  function draw() {
    const began = performance.now(), view = state(), { l, s, g, k } = view;
    const token = get('token') >= 0 ? get('token') : hovered, e = arrays.panes[get('left')]?.values ?? arrays.panes[get('right')]?.values ?? null;
    drawPane(left, get('left'), view, token);
    drawPane(right, get('right'), view, token);
    root.classList.toggle('double', !right.node.hidden);
    if (hasLabels) {
      steps.show(s, `${arrays.steps[s][0]}${arrays.steps[s][1] === null ? '' : `  σ ${figure3(arrays.steps[s][1])}`}`);
      blocks.show(l, shortName(arrays.blocks[l]));
      opacity.show(get('opacity'), `${Math.round(100 * get('opacity'))} %`);
      groups.show(arrays.groups[g]);
      if (e !== null) {
        if (hasMaps) drawBars(view, e, token);
        drawLegend(view, e);
      }
      drawToken(view, e ?? 0, token);
    }
    if (atlas) {
      ink ??= getComputedStyle(root).color;
      atlas.paint(e ?? 0, g, k, get('palette'), tables[get('palette')], ink);
      atlas.point(l, s);
      // Thousands of points: in the next frame, so that the image does not wait.
      if (spectrum && spectrumKey !== (spectrumKey = [l, g, k, ink].join())) requestAnimationFrame(() => spectrum.draw(l, g, arrays.channel(l, g, k), ink, ACCENT));
    }
    overlays.show(get('overlay'));
    paneChoice.select.value = get('left'); besideChoice.select.value = get('right');
    palette.select.value = get('palette'); scale.select.value = get('scale');
    code.show();
    Object.assign(root.dataset, { view: `${get('step')}/${get('site')}/${get('channel')}`, overlay: get('overlay'), draws: ++draws, ms: (performance.now() - began).toFixed(2) });
  }

  // The theme of the page may change under the view: its own setting, JupyterLab's, or that of the documentation.
  const restyle = () => { ink = null; draw(); };
  const dark = matchMedia('(prefers-color-scheme: dark)'), themes = new MutationObserver(restyle);
  dark.addEventListener('change', restyle);
  for (const node of [document.documentElement, document.body]) themes.observe(node, { attributeFilter: ['data-theme', 'data-jp-theme-name', 'class'] });
  draw();
  return () => { dark.removeEventListener('change', restyle); themes.disconnect(); };
}

export default { render };
