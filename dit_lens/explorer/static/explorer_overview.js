// Overviews beside the images: all blocks and steps, and the scores of all channels.

// Thumbnails of the maps at all blocks and steps; a click shows one.
class Overview {
  constructor(data, jump) {
    Object.assign(this, { data, th: data.th, tw: data.tw });
    this.canvas = make('canvas', { tabIndex: 0, role: 'img' });
    this.base = make('canvas', { width: data.steps.length * this.tw, height: data.blocks.length * this.th });
    const across = clamp(Math.floor(560 / data.steps.length), 6, 28);
    this.cell = [across, clamp(Math.round(across * this.th / this.tw), 6, 28)];
    this.gutter = 34;
    const [cw, ch] = this.cell;
    this.size = [this.gutter + cw * data.steps.length + 2, ch * data.blocks.length + 20];
    this.canvas.style.width = `${this.size[0]}px`;
    this.cursor = make('i', { className: 'cursor' });
    Object.assign(this.cursor.style, { width: `${cw}px`, height: `${ch}px` });
    this.node = make('div', { className: 'overview' }, this.canvas, this.cursor);
    this.canvas.addEventListener('click', event => jump(...this.cellAt(event)));
    this.canvas.addEventListener('pointermove', event => {
      const [l, s] = this.cellAt(event);
      this.canvas.title = `${data.blocks[l]}, step ${data.steps[s][0]}`;
    });
    this.canvas.addEventListener('keydown', event => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      jump(clamp(this.l + move[0], 0, data.blocks.length - 1), clamp(this.s + move[1], 0, data.steps.length - 1));
      event.preventDefault();
    });
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), scale = this.size[0] / box.width;
    const x = (event.clientX - box.left) * scale - this.gutter, y = (event.clientY - box.top) * scale;
    return [
      clamp(Math.floor(y / this.cell[1]), 0, this.data.blocks.length - 1),
      clamp(Math.floor(x / this.cell[0]), 0, this.data.steps.length - 1),
    ];
  }

  // Draws all thumbnails of a channel, unless they are drawn already.
  // layers: their colours. e, other: the image, and the one whose values are subtracted, or null. ink: of text.
  draw(layers, { g, k }, e, other, ink) {
    const { data, th, tw } = this, key = [e, other, g, k, data.other?.number, layers.get('palette'), layers.get('scale'), ink].join();
    if (key === this.key) return;
    this.key = key;
    const columns = data.steps.length * tw, context = this.base.getContext('2d');
    const pixels = context.createImageData(columns, this.base.height), rgba = new Uint8ClampedArray(4 * th * tw);
    const palette = layers.palette(g, k);
    for (let l = 0; l < data.blocks.length; l++) {
      if (data.channel(l, g, k) < 0) continue;
      const span = data.span(l, g, k);
      for (let s = 0; s < data.steps.length; s++) {
        layers.paint(layers.thumb({ l, s, g, k }, e, other, palette, span))(rgba);
        for (let y = 0; y < th; y++) pixels.data.set(rgba.subarray(4 * y * tw, 4 * (y + 1) * tw), 4 * ((l * th + y) * columns + s * tw));
      }
    }
    context.putImageData(pixels, 0, 0);
    this.drawLabels(ink);
  }

  // Enlarges the thumbnails and adds the numbers of blocks and steps.
  drawLabels(ink) {
    const { data, canvas, gutter } = this, [cw, ch] = this.cell, scale = Math.ceil(devicePixelRatio || 1);
    const [width, height] = this.size, across = data.steps.length, down = data.blocks.length;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.base, gutter, 0, cw * across, ch * down);
    Object.assign(context, { fillStyle: ink, font: '10px system-ui, sans-serif', textAlign: 'right', textBaseline: 'middle' });
    const every = Math.ceil(11 / ch), along = Math.ceil(18 / cw);
    for (let l = 0; l < down; l += every) context.fillText(shortName(data.blocks[l]).slice(-6), gutter - 4, (l + 0.5) * ch);
    context.textAlign = 'center';
    for (let s = 0; s < across; s += along) context.fillText(data.steps[s][0], gutter + (s + 0.5) * cw, ch * down + 11);
  }

  // Moves the cursor.
  mark(l, s) {
    Object.assign(this, { l, s });
    this.cursor.style.transform = `translate(${this.gutter + s * this.cell[0]}px, ${l * this.cell[1]}px)`;
    this.canvas.setAttribute('aria-label', `All blocks and steps; at ${this.data.blocks[l]}, step ${this.data.steps[s][0]}. Arrow keys move.`);
  }
}

// The scores of all channels of a block by rank, with logarithmic axes; the channels of the group are marked. A click
// chooses the channel of a rank.
class Spectrum {
  // choose(channel): called with the channel that is clicked.
  constructor(data, choose) {
    this.data = data;
    this.width = data.blocks.length ? data.scores.length / data.blocks.length : 0;
    this.canvas = make('canvas', { width: 760, height: 260, tabIndex: 0, role: 'img', className: 'spectrum' });
    this.canvas.addEventListener('click', event => choose(this.order[this.rankAt(event)]));
    this.canvas.addEventListener('pointermove', event => {
      const rank = this.rankAt(event), channel = this.order[rank];
      this.canvas.title = `channel ${channel}, rank ${rank + 1}, score ${threeDigits(this.scores[channel])}`;
    });
    this.canvas.addEventListener('keydown', event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      choose(this.order[clamp(this.order.indexOf(this.chosen) + move, 0, this.width - 1)]);
      event.preventDefault();
    });
    let low = Infinity, high = 0;
    for (const score of data.scores) if (score > 0) { low = Math.min(low, score); high = Math.max(high, score); }
    Object.assign(this, { low, high });
  }

  x(rank) { return 84 + (this.canvas.width - 104) * Math.log(rank + 1) / Math.log(this.width); }

  rankAt(event) {
    const box = this.canvas.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * this.canvas.width;
    return clamp(Math.round(Math.exp((x - 84) / (this.canvas.width - 104) * Math.log(this.width)) - 1), 0, this.width - 1);
  }

  draw(l, g, chosen, ink, accent) {
    const { data, width, canvas } = this, context = canvas.getContext('2d');
    const scores = data.scores.subarray(l * width, (l + 1) * width);
    const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]), rank = new Map(order.map((c, i) => [c, i]));
    Object.assign(this, { scores, order, chosen });
    const y = v => 14 + (canvas.height - 56) * (1 - Math.log(Math.max(v, this.low) / this.low) / Math.log(this.high / this.low || 10));
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.strokeStyle = context.fillStyle = ink;
    context.font = '20px system-ui, sans-serif';
    context.lineWidth = 2;
    context.beginPath();
    order.forEach((c, i) => context.lineTo(this.x(i), y(scores[c])));
    context.stroke();
    context.textAlign = 'right';
    for (const value of [this.high, this.low]) context.fillText(threeDigits(value), 72, y(value) + 7);
    context.textAlign = 'center';
    for (let i = 1; i <= width; i *= 10) context.fillText(i, this.x(i - 1), canvas.height - 14);
    const marked = data.labelled[data.groups[g]] ? [] : Array.from({ length: data.K }, (_, k) => data.channel(l, g, k));
    for (const channel of new Set([...marked, chosen])) {
      if (!rank.has(channel)) continue;
      context.fillStyle = accent;
      context.globalAlpha = channel === chosen ? 1 : 0.55;
      context.beginPath();
      context.arc(this.x(rank.get(channel)), y(scores[channel]), channel === chosen ? 9 : 6, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
    const shown = rank.has(chosen) ? `; channel ${chosen} is rank ${rank.get(chosen) + 1}` : '';
    canvas.setAttribute('aria-label', `Score of all ${width} channels of ${data.blocks[l]} by rank${shown}. A click or the arrow keys choose one.`);
  }
}
