// Images with their overlays.

const MARK = '#ffffff', MARK_EDGE = '#000000';

// Interpolates the colours of a palette to a table of 256 colours, as RGB bytes.
function interpolatePalette(palette) {
  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const position = i / 255 * (palette.length - 1), a = Math.min(Math.floor(position), palette.length - 2), t = position - a;
    for (let c = 0; c < 3; c++) table[3 * i + c] = Math.round(palette[a][c] * (1 - t) + palette[a + 1][c] * t);
  }
  return table;
}

// One image with its overlay and the marks of tokens.
class Pane {
  // select(token, keep): called when a token is pointed at, and to keep it when it is clicked; -1 for none.
  constructor(data, side, select) {
    this.data = data;
    this.canvas = make('canvas', { tabIndex: 0, role: 'img' });
    this.canvas.dataset.side = side;
    this.context = this.canvas.getContext('2d');
    this.small = make('canvas', { width: data.w, height: data.h });
    this.pixels = this.small.getContext('2d').createImageData(data.w, data.h);
    this.caption = make('figcaption');
    this.node = make('figure', {}, this.canvas, this.caption);
    this.canvas.addEventListener('pointermove', event => select(this.tokenAt(event), false));
    this.canvas.addEventListener('pointerleave', () => select(-1, false));
    this.canvas.addEventListener('click', event => select(this.tokenAt(event), true));
    this.canvas.addEventListener('keydown', event => this.moveByKey(event, select));
  }

  tokenAt(event) {
    const { w, h } = this.data, box = this.canvas.getBoundingClientRect();
    const x = clamp(Math.floor((event.clientX - box.left) / box.width * w), 0, w - 1);
    return clamp(Math.floor((event.clientY - box.top) / box.height * h), 0, h - 1) * w + x;
  }

  moveByKey(event, select) {
    const { w, h } = this.data;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) {
      const from = this.selected < 0 ? Math.floor(h / 2) * w + Math.floor(w / 2) : this.selected;
      select(clamp(Math.floor(from / w) + move[1], 0, h - 1) * w + clamp(from % w + move[0], 0, w - 1), true);
    } else if (event.key === 'Escape') select(-1, true);
    else return;
    event.preventDefault();
  }

  resize(image) {
    const { w, h } = this.data, width = 384 * Math.ceil(devicePixelRatio || 1);
    const height = Math.round(image ? width * image.height / image.width : width * h / w);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
  }

  // overlay: writes RGBA of every token, or null. marks: the selected token, the one to mark, and its neighbours.
  draw(image, overlay, opacity, marks) {
    const { context, canvas } = this;
    this.resize(image);
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
    this.selected = marks.selected;
    for (const n of marks.neighbours) this.mark(n, 1);
    if (marks.token >= 0) this.mark(marks.token, 3);
  }

  mark(n, width) {
    const { w, h } = this.data, { context, canvas } = this, dx = canvas.width / w, dy = canvas.height / h;
    const scale = canvas.width / 384;
    for (const [colour, extra] of [[MARK_EDGE, 2], [MARK, 0]]) {
      context.strokeStyle = colour;
      context.lineWidth = (width + extra) * scale;
      context.strokeRect((n % w) * dx, Math.floor(n / w) * dy, dx, dy);
    }
  }
}
