// Images with their overlays.

const MARK = '#ffffff', MARK_EDGE = '#000000', SIDE = 384;

// An image in grey with little contrast, so that the colours over it are those of the legend.
function toGrey(image) {
  const canvas = make('canvas', { width: image.width, height: image.height }), context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height), { data } = pixels;
  for (let p = 0; p < data.length; p += 4) {
    const light = 0.299 * data[p] + 0.587 * data[p + 1] + 0.114 * data[p + 2];
    data[p] = data[p + 1] = data[p + 2] = 255 * UNDER + 0.8 * (light - 127.5);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
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
    this.greys = new WeakMap();
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
    const { w, h } = this.data, width = SIDE * Math.ceil(devicePixelRatio || 1);
    const height = Math.round(image ? width * image.height / image.width : width * h / w);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
  }

  // overlay: writes RGBA of every token, or null. marks: the selected token, the one to mark, and its neighbours.
  // minus: an image whose difference to the image is shown, or null.
  draw(image, overlay, opacity, marks, minus = null) {
    const { context, canvas } = this;
    this.resize(image);
    context.globalAlpha = 1;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (image) this.drawImage(overlay ? this.grey(image) : image);
    if (image && minus) {
      context.globalCompositeOperation = 'difference';
      this.drawImage(minus);
      context.globalCompositeOperation = 'source-over';
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

  drawImage(image) {
    this.context.imageSmoothingEnabled = image.width > 128;
    this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
  }

  grey(image) {
    if (!this.greys.has(image)) this.greys.set(image, toGrey(image));
    return this.greys.get(image);
  }

  // Covers the image with another one, from a share of the width to its right end.
  cover(other, share) {
    const { context, canvas } = this, x = Math.round(share * canvas.width), scale = canvas.width / SIDE;
    const from = Math.round(share * other.canvas.width);
    if (x < canvas.width) {
      context.clearRect(x, 0, canvas.width - x, canvas.height);
      context.drawImage(other.canvas, from, 0, other.canvas.width - from, other.canvas.height, x, 0, canvas.width - x, canvas.height);
    }
    for (const [colour, width] of [[MARK_EDGE, 4], [MARK, 2]]) {
      context.fillStyle = colour;
      context.fillRect(x - width * scale / 2, 0, width * scale, canvas.height);
    }
  }

  mark(n, width) {
    const { w, h } = this.data, { context, canvas } = this, dx = canvas.width / w, dy = canvas.height / h;
    const scale = canvas.width / SIDE;
    for (const [colour, extra] of [[MARK_EDGE, 2], [MARK, 0]]) {
      context.strokeStyle = colour;
      context.lineWidth = (width + extra) * scale;
      context.strokeRect((n % w) * dx, Math.floor(n / w) * dy, dx, dy);
    }
  }
}
