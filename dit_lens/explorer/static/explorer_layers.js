// What is laid over an image: values of tokens, the range that their colours span, and the palette.

const SEQUENTIAL = 'Cividis', DIVERGING = 'RdBu';
const BOTH_SIGNS = 0.25;  // of the larger side of 0, which the smaller one must reach for a channel to count as signed
const UNDER = 0.5;  // brightness of the grey image under a map, on average

// Interpolates the colours of a palette to a table of 256 colours, as RGB bytes.
function interpolatePalette(palette) {
  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const position = i / 255 * (palette.length - 1), a = Math.min(Math.floor(position), palette.length - 2), t = position - a;
    for (let c = 0; c < 3; c++) table[3 * i + c] = Math.round(palette[a][c] * (1 - t) + palette[a + 1][c] * t);
  }
  return table;
}

// The palette "auto": diverging for a channel with values on both sides of 0, sequential for others.
function choosePalette(name, [low, high]) {
  if (name !== 'auto') return name;
  return Math.min(-low, high) > BOTH_SIGNS * Math.max(-low, high) ? DIVERGING : SEQUENTIAL;
}

// The range that a palette spans: that of a diverging one has 0 in the middle.
function centre(palette, [low, high]) {
  const most = Math.max(Math.abs(low), Math.abs(high));
  return palette === DIVERGING ? [-most, most] : [low, high];
}

// Writes the colours of values as RGBA.
function paint(values, [from, to], table, rgba) {
  const gain = to > from ? 255 / (to - from) : 0, middle = to > from ? 0 : 127;
  for (let n = 0, p = 0; n < values.length; n++, p += 4) {
    const v = 3 * clamp(Math.round(middle + gain * (values[n] - from)), 0, 255);
    rgba[p] = table[v]; rgba[p + 1] = table[v + 1]; rgba[p + 2] = table[v + 2]; rgba[p + 3] = 255;
  }
}

const subtract = (one, other) => one && other && one.map((value, n) => value - other[n]);

function extremes(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

// The layers of a view. palette and scale: what the state says.
class Layers {
  constructor(data, get) {
    Object.assign(this, { data, get });
    this.tables = Object.fromEntries(Object.entries(data.palettes).map(([name, colours]) => [name, interpolatePalette(colours)]));
  }

  // The palette of a channel, or of the channels of one rank: one for all blocks, steps and images.
  palette(g, k) {
    if (this.get('palette') !== 'auto') return this.get('palette');
    const blocks = this.data.blocks.map((_, l) => l).filter(l => this.data.channel(l, g, k) >= 0);
    return choosePalette(this.get('palette'), unite(blocks.map(l => this.data.span(l, g, k))));
  }

  // A channel's map of image e, among the images that share its range. { values, range, palette }, or null.
  heat(view, e, shown) {
    const { l, s, g, k } = view, { data } = this, values = data.channel(l, g, k) >= 0 ? data.values(l, e, s, g, k) : null;
    return values && { values, ...this.colours(view, e, shown) };
  }

  // The palette and the range of that map.
  colours({ l, s, g, k }, e, shown) {
    const { data } = this, palette = this.palette(g, k), scale = this.get('scale');
    const range = scale === 'steps' ? data.span(l, g, k) : unite((scale === 'own' ? [e] : shown).map(one => data.range(l, one, s, g, k)));
    return { range: centre(palette, range), palette };
  }

  // The map of one image minus that of another.
  difference({ l, s, g, k }, e, other) {
    const { data } = this, at = step => subtract(data.values(l, e, step, g, k), data.values(l, other, step, g, k));
    const values = data.channel(l, g, k) >= 0 ? at(s) : null;
    if (!values) return null;
    const steps = this.get('scale') === 'steps' ? data.steps.map((_, step) => at(step)) : [values];
    return { values, range: centre(DIVERGING, unite(steps.map(extremes))), palette: DIVERGING };
  }

  // The thumbnail of a map, or of a difference of two: as above.
  thumb({ l, s, g, k }, e, other, palette, span) {
    const { data } = this, one = data.thumbValues(l, e, s, g, k);
    if (other !== null) {
      const values = subtract(one, data.thumbValues(l, other, s, g, k));
      return { values, range: centre(DIVERGING, extremes(values)), palette: DIVERGING };
    }
    return { values: one, range: centre(palette, this.get('scale') === 'steps' ? span : data.range(l, e, s, g, k)), palette };
  }

  // Writes RGBA of every token: a layer of values.
  paint({ values, range, palette }) { return rgba => paint(values, range, this.tables[palette], rgba); }

  // Writes RGBA of every token: its cluster, at tokens that are not in the same one of another image.
  regions({ l, s, g }, e, other) {
    const { data } = this, labels = data.labels(l, e, s, g), others = other === null ? null : data.labels(l, other, s, g);
    return labels && (rgba => {
      for (let n = 0, p = 0; n < labels.length; n++, p += 4) {
        const colour = data.clusterColours[labels[n] % data.clusterColours.length];
        rgba[p] = colour[0]; rgba[p + 1] = colour[1]; rgba[p + 2] = colour[2];
        rgba[p + 3] = labels[n] === NO_CLUSTER || labels[n] === others?.[n] ? 0 : 255;
      }
    });
  }

  // The colours of a palette as they look over the grey image, for a legend.
  stops(palette) {
    const opacity = this.get('opacity');
    return this.data.palettes[palette].map(colour => `rgb(${colour.map(c => Math.round(opacity * c + (1 - opacity) * 255 * UNDER))})`);
  }
}
