// A mask that is brushed on images: tokens of a grid, which all images of the panel have in common.

const CELL = 16;  // pixels of the canvas for each token

class Brush {
  // images: figures, as figure() makes them. onChange(tokens): called when a stroke has ended.
  constructor([h, w], images, onChange) {
    Object.assign(this, { h, w, onChange, tokens: new Set(), cursor: Math.floor(h / 2) * w + Math.floor(w / 2), radius: 1, painting: null });
    this.canvases = images.map(({ image, name }) => {
      const canvas = make('canvas', { width: w * CELL, height: h * CELL, tabIndex: 0, className: 'brush', role: 'application' });
      image.parentElement.append(canvas);
      canvas.addEventListener('pointerdown', event => { canvas.setPointerCapture(event.pointerId); this.begin(this.tokenAt(event)); event.preventDefault(); canvas.focus(); });
      canvas.addEventListener('pointermove', event => { if (this.painting !== null) this.paint(this.tokenAt(event)); });
      for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => this.end());
      canvas.addEventListener('keydown', event => this.useKey(event));
      canvas.addEventListener('focus', () => this.draw());
      canvas.addEventListener('blur', () => this.draw());
      return { canvas, name };
    });
  }

  tokenAt(event) {
    const box = event.target.getBoundingClientRect(), at = (position, side, count) => clamp(Math.floor(position / side * count), 0, count - 1);
    return at(event.clientY - box.top, box.height, this.h) * this.w + at(event.clientX - box.left, box.width, this.w);
  }

  // A stroke that begins on a marked token takes away; another one adds.
  begin(token) { this.painting = !this.tokens.has(token); this.paint(token); }
  end() { if (this.painting === null) return; this.painting = null; this.report(); }
  report() { this.onChange([...this.tokens].sort((a, b) => a - b)); }

  paint(token) {
    const row = Math.floor(token / this.w), column = token % this.w, r = this.radius;
    for (let y = Math.max(0, row - r); y <= Math.min(this.h - 1, row + r); y++) for (let x = Math.max(0, column - r); x <= Math.min(this.w - 1, column + r); x++) {
      if ((y - row) ** 2 + (x - column) ** 2 > (r + 0.3) ** 2) continue;
      if (this.painting) this.tokens.add(y * this.w + x); else this.tokens.delete(y * this.w + x);
    }
    this.cursor = token;
    this.draw();
  }

  useKey(event) {
    const { w, h } = this, row = Math.floor(this.cursor / w), column = this.cursor % w;
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move) this.cursor = clamp(row + move[0], 0, h - 1) * w + clamp(column + move[1], 0, w - 1);
    else if (event.key === ' ') { this.begin(this.cursor); this.end(); }
    else return;
    event.preventDefault();
    this.draw();
  }

  set(tokens) { if (this.painting === null) { this.tokens = new Set(tokens); this.draw(); } }
  clear() { this.tokens.clear(); this.report(); }
  invert() { this.tokens = new Set(Array.from({ length: this.h * this.w }, (_, n) => n).filter(n => !this.tokens.has(n))); this.report(); }

  // Draws a line around the mask, and darkens what is outside of it; not of the result, which is to be seen.
  draw() {
    const { w, h, tokens } = this;
    for (const { canvas, name } of this.canvases) {
      const context = canvas.getContext('2d');
      context.clearRect(0, 0, canvas.width, canvas.height);
      if (tokens.size) {
        context.fillStyle = 'rgba(0, 0, 0, 0.6)';
        if (name !== 'result') for (let n = 0; n < w * h; n++) if (!tokens.has(n)) context.fillRect(n % w * CELL, Math.floor(n / w) * CELL, CELL, CELL);
        context.fillStyle = '#ffffff';
        for (const n of tokens) {
          const x = n % w, y = Math.floor(n / w);
          const border = (dx, dy, ...box) => { if (x + dx >= 0 && x + dx < w && y + dy >= 0 && y + dy < h && !tokens.has(n + dx + dy * w)) context.fillRect(...box); };
          border(-1, 0, x * CELL, y * CELL, 2, CELL); border(1, 0, (x + 1) * CELL - 2, y * CELL, 2, CELL);
          border(0, -1, x * CELL, y * CELL, CELL, 2); border(0, 1, x * CELL, (y + 1) * CELL - 2, CELL, 2);
        }
      }
      if (canvas.matches(':focus')) {
        for (const [colour, width] of [['#000000', 5], ['#ffffff', 2]]) {
          Object.assign(context, { strokeStyle: colour, lineWidth: width });
          context.strokeRect(this.cursor % w * CELL, Math.floor(this.cursor / w) * CELL, CELL, CELL);
        }
      }
      canvas.setAttribute('aria-label', `mask on the ${name}: ${tokens.size} of ${w * h} tokens; at row ${Math.floor(this.cursor / w)}, column ${this.cursor % w}. Arrow keys move, space marks.`);
    }
  }
}
