// The view as a PNG file: images, their captions and the legend.

// Text of a width, in lines.
function wrapText(context, text, width) {
  const lines = [''];
  for (const word of text.split(' ')) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && context.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

// root: of the widget, whose colours are used. panes: those that are shown are drawn. legend: [{ name, range, palette }].
function savePicture(root, panes, legend, name) {
  const shown = panes.filter(pane => !pane.node.hidden), side = Math.max(...shown.map(pane => pane.canvas.width)), unit = side / SIDE;
  const gap = 12 * unit, line = 18 * unit, style = getComputedStyle(root), canvas = make('canvas', { width: shown.length * (side + gap) + gap });
  const context = canvas.getContext('2d'), font = `${13 * unit}px system-ui, sans-serif`;
  context.font = font;
  const captions = shown.map(pane => wrapText(context, pane.canvas.getAttribute('aria-label'), side));
  const height = Math.max(...shown.map(pane => pane.canvas.height)), below = height + 2 * gap + line * Math.max(...captions.map(lines => lines.length));
  canvas.height = below + legend.length * 1.4 * line + (legend.length ? gap : 0);
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(context, { font, fillStyle: style.color, textBaseline: 'middle' });
  shown.forEach((pane, i) => {
    const x = gap + i * (side + gap);
    context.drawImage(pane.canvas, x, gap);
    captions[i].forEach((text, row) => context.fillText(text, x, gap + height + line * (row + 0.8)));
  });
  legend.forEach(({ name: title, range, colours }, row) => {
    const y = below + (row + 0.5) * 1.4 * line, low = `${title ? `${title}  ` : ''}${threeDigits(range[0])}`;
    context.fillText(low, gap, y);
    const x = gap + context.measureText(low).width + 6 * unit, gradient = context.createLinearGradient(x, 0, x + 0.5 * side, 0);
    colours.forEach((colour, i) => gradient.addColorStop(i / (colours.length - 1), colour));
    context.save();
    context.fillStyle = gradient;
    context.fillRect(x, y - 5 * unit, 0.5 * side, 10 * unit);
    context.restore();
    context.fillText(threeDigits(range[1]), x + 0.5 * side + 6 * unit, y);
  });
  canvas.toBlob(blob => {
    const link = make('a', { href: URL.createObjectURL(blob), download: `${name}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}
