// The explorer: controls, images, overviews, and what ties them to the state. explorer_data.js explains the letters.

const ACCENT = '#D55E00', STATE = ['left', 'right', 'step', 'site', 'group', 'channel', 'overlay', 'palette', 'scale', 'opacity', 'token'];

// Buttons for few groups, a list for many.
function makeGroupControl(data, onChoose) {
  const names = data.groups.map(name => [name, name]), label = data.masks ? 'mask of' : 'group of channels';
  if (names.length <= 6) return toggles(label, names, onChoose);
  const { row, select } = choice(label, names, onChoose);
  return { row, show: name => { select.value = name; } };
}

// Returns i -> the decoded image of a pane, or null until it is decoded, which starts with the first call.
function imageDecoder(panes, files, changed) {
  const decoded = new Map();
  return i => {
    const pane = panes[i];
    if (!pane || !pane.bytes) return null;
    if (!decoded.has(i)) {
      decoded.set(i, null);
      const [from, to] = pane.bytes;
      createImageBitmap(new Blob([files.subarray(from, to)], { type: pane.mime })).then(bitmap => { decoded.set(i, bitmap); changed(); });
    }
    return decoded.get(i);
  };
}

function render({ model, el }) {
  const data = new ExplorerData(model, () => draw()), get = name => model.get(name), change = stateful(model, STATE, () => draw());
  const hasMaps = data.K > 0 && data.mappedImages > 0, hasClusters = data.mappedImages > 0, several = data.panes.length > 1;
  const images = imageDecoder(data.panes, bytes(get('data_images')), () => draw());
  const tables = Object.fromEntries(Object.entries(data.palettes).map(([name, colours]) => [name, interpolatePalette(colours)]));
  const clusterColours = data.clusterColours;
  let hovered = -1, draws = 0, spectrumKey = '', ink = null;

  const indices = () => {
    const l = Math.max(0, data.blocks.indexOf(get('site'))), g = Math.max(0, data.groups.indexOf(get('group')));
    const s = Math.max(0, data.steps.findIndex(([index]) => index === get('step')));
    let k = 0;
    for (let i = 0; i < data.K; i++) if (data.channel(l, g, i) === get('channel')) k = i;
    return { l, g, s, k };
  };
  // Shows another block or group: the same channel if it is there, otherwise the one of the same rank.
  const show = (l, g, others = {}) => {
    const { k } = indices();
    const has = [...Array(data.K).keys()].some(i => data.channel(l, g, i) === get('channel'));
    const channel = data.K ? data.channel(l, g, k) : -1;
    change({ ...others, site: data.blocks[l] ?? '', group: data.groups[g] ?? '', ...(has || !hasMaps ? {} : { channel: channel >= 0 ? channel : data.channel(l, g, 0) }) });
  };
  const select = (n, keep) => {
    if (keep) change({ token: n === get('token') ? -1 : n });
    else if (n !== hovered) { hovered = n; draw(); }
  };

  const left = new Pane(data, 'left', select), right = new Pane(data, 'right', select);
  const names = data.panes.map((pane, i) => [i, pane.name]);
  const leftControl = choice('image', names, value => change({ left: +value }));
  const rightControl = choice('beside it', [[-1, 'nothing'], ...names], value => change({ right: +value }));
  const overlays = toggles('overlay', [...(hasMaps ? [['heat', 'channel']] : []), ...(hasClusters ? [['clusters', data.masks ? 'mask' : 'clusters']] : []), ['none', 'image']], overlay => change({ overlay }));
  const palette = choice('colours', Object.keys(data.palettes).map(name => [name, name]), value => change({ palette: value }));
  const scale = choice('scale', [['map', 'of this map'], ['steps', 'of all steps']], value => change({ scale: value }));
  const opacity = slider('opacity', { max: 1, step: 0.05, onInput: value => change({ opacity: value }) });
  const steps = slider('step', { max: data.steps.length - 1, onInput: s => change({ step: data.steps[s][0] }) });
  const blocks = slider('block', { max: data.blocks.length - 1, onInput: l => show(l, indices().g) });
  const groups = makeGroupControl(data, name => show(indices().l, data.groups.indexOf(name)));
  const bars = Array.from({ length: data.K }, (_, k) => {
    const name = make('span'), bar = make('i'), value = make('b');
    const button = make('button', { type: 'button', className: 'bar', 'aria-pressed': 'false' }, name, make('span', { className: 'track' }, bar), value);
    button.addEventListener('click', () => { const { l, g } = indices(); change({ channel: data.channel(l, g, k) }); });
    return { button, name, bar, value };
  });
  const legend = make('div', { className: 'legend' });
  const about = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' });
  const overview = hasMaps ? new Overview(data, (l, s) => show(l, indices().g, { step: data.steps[s][0] })) : null;
  const spectrum = data.scores.length ? new Spectrum(data) : null;
  const code = codeBox(() => data.code.replace('{state}', stateCode()));

  const stateCode = () => STATE.filter(name => get(name) !== data.initial[name]).map(name => `, ${name}=${toPython(get(name))}`).join('');

  const part = (title, ...nodes) => make('div', { className: 'part' }, make('h4', {}, title), ...nodes);
  const root = region('dit_lens explorer',
    make('div', { className: 'top' }, ...(several ? [leftControl.row, rightControl.row] : []), overlays.row, ...(hasMaps ? [palette.row, scale.row] : [])),
    make('div', { className: 'stage' },
      make('div', { className: 'panes' }, left.node, right.node),
      make('div', { className: 'side' },
        ...(data.blocks.length > 1 ? [blocks.row] : []), ...(data.steps.length > 1 ? [steps.row] : []), ...(hasClusters ? [opacity.row, groups.row] : []),
        make('div', { className: 'bars' }, ...bars.map(bar => bar.button)), legend, about)),
    make('div', { className: 'below' },
      ...(overview ? [part('blocks (down) and steps (across)', overview.node)] : []),
      ...(spectrum ? [part('score |mean| of every channel, by rank', spectrum.canvas)] : [])),
    ...(data.note ? [make('p', { className: 'token' }, data.note)] : []), code.row);
  el.append(root);

  // Overlays: functions that write RGBA of every token, or null.
  const heat = (e, { l, s, g, k }) => {
    const map = data.map(l, e, s, g, k), table = tables[get('palette')];
    if (!map || data.channel(l, g, k) < 0) return null;
    const [low, high] = data.range(l, e, s, g, k), [from, to] = get('scale') === 'steps' ? data.span(l, g, k) : [low, high];
    const gain = to > from ? (high - low) / (to - from) : 1, shift = to > from ? 255 * (low - from) / (to - from) : 0;
    return rgba => {
      for (let n = 0, p = 0; n < map.length; n++, p += 4) {
        const v = 3 * Math.round(shift + gain * map[n]);
        rgba[p] = table[v]; rgba[p + 1] = table[v + 1]; rgba[p + 2] = table[v + 2]; rgba[p + 3] = 255;
      }
    };
  };
  const regions = (e, { l, s, g }) => {
    const labels = data.labels(l, e, s, g);
    return labels && (rgba => {
      for (let n = 0, p = 0; n < labels.length; n++, p += 4) {
        const colour = clusterColours[labels[n] % clusterColours.length];
        rgba[p] = colour[0]; rgba[p + 1] = colour[1]; rgba[p + 2] = colour[2]; rgba[p + 3] = labels[n] === NO_CLUSTER ? 0 : 255;
      }
    });
  };

  function drawPane(pane, i, view, token) {
    const shown = data.panes[i];
    pane.node.hidden = !shown;
    if (!shown) return;
    const e = shown.mapIndex, overlay = e === null ? null : { heat, clusters: regions, none: () => null }[get('overlay')](e, view);
    const neighbours = token >= 0 && e !== null && hasMaps ? data.neighbours(view.l, e, view.s, view.g, token) : [];
    pane.draw(images(i), overlay, get('opacity'), { token, neighbours, selected: get('token') });
    pane.caption.textContent = several ? shown.name : '';
    const where = hasClusters ? `, ${data.blocks[view.l]}, step ${data.steps[view.s][0]}` : '';
    const what = get('overlay') === 'heat' && hasMaps ? `, channel ${data.channel(view.l, view.g, view.k)}` : '';
    pane.canvas.setAttribute('aria-label', shown.name + where + what);
  }

  function drawBars({ l, g, s, k }, e, token) {
    let largest = 1e-12;
    const values = bars.map((_, i) => token >= 0 ? data.value(l, e, s, g, i, token) : data.mean(l, e, s, g, i));
    for (const value of values) if (Math.abs(value) > largest) largest = Math.abs(value);
    bars.forEach((bar, i) => {
      const channel = data.channel(l, g, i);
      bar.button.hidden = channel < 0;
      bar.name.textContent = `channel ${channel}`;
      bar.bar.style.width = `${100 * Math.abs(values[i] || 0) / largest}%`;
      bar.bar.className = values[i] < 0 ? 'negative' : '';
      bar.value.textContent = threeDigits(values[i]);
      bar.button.setAttribute('aria-pressed', String(i === k));
    });
  }

  function drawLegend(view, e) {
    const { l, s, g, k } = view;
    if (get('overlay') === 'heat') {
      const [low, high] = get('scale') === 'steps' ? data.span(l, g, k) : data.range(l, e, s, g, k);
      const stops = data.palettes[get('palette')].map(colour => `rgb(${colour})`).join(', ');
      legend.replaceChildren(threeDigits(low), make('i', { style: `background: linear-gradient(to right, ${stops})` }), threeDigits(high));
    } else if (get('overlay') === 'clusters') {
      const labels = data.labels(l, e, s, g), counts = new Map();
      for (const label of labels ?? []) counts.set(label, (counts.get(label) ?? 0) + 1);
      const names = data.masks ? ['outside', 'inside'] : ['coldest', ...(counts.size > 2 ? Array(counts.size - 2).fill('') : []), 'hottest'];
      const known = [...counts].filter(([label]) => label !== NO_CLUSTER).sort();
      legend.replaceChildren(...known.map(([label, count]) => make('span', { className: 'key' },
        make('i', { style: `background: rgb(${clusterColours[label % clusterColours.length]})` }), `${names[label] ?? label}: ${count} tokens`)));
      if (!labels) legend.textContent = 'K-means …';
    } else legend.replaceChildren();
  }

  function drawToken({ l, s, g }, e, token) {
    if (token < 0) { about.textContent = hasMaps ? 'Bars: mean over tokens. Point at a token for its values; click to keep it.' : ''; return; }
    const labels = get('overlay') === 'clusters' && data.labels(l, e, s, g), neighbours = hasMaps ? data.neighbours(l, e, s, g, token) : [];
    const name = n => `${Math.floor(n / data.w)}, ${n % data.w}`;
    about.textContent = `Token ${token} (row ${Math.floor(token / data.w)}, column ${token % data.w})` +
      (labels ? `, ${data.masks ? ['outside', 'inside'][labels[token]] ?? 'no mask' : `cluster ${labels[token]}`}` : '') +
      (hasMaps ? `. Bars: its values. Nearest in these channels (row, column): ${neighbours.map(name).join('; ')}.` : '.');
  }

  function draw() {
    const start = performance.now(), view = indices(), { l, s, g, k } = view;
    const token = get('token') >= 0 ? get('token') : hovered, e = data.panes[get('left')]?.mapIndex ?? data.panes[get('right')]?.mapIndex ?? null;
    drawPane(left, get('left'), view, token);
    drawPane(right, get('right'), view, token);
    root.classList.toggle('double', !right.node.hidden);
    if (hasClusters) {
      steps.show(s, `${data.steps[s][0]}${data.steps[s][1] === null ? '' : `  σ ${threeDigits(data.steps[s][1])}`}`);
      blocks.show(l, shortName(data.blocks[l]));
      opacity.show(get('opacity'), `${Math.round(100 * get('opacity'))} %`);
      groups.show(data.groups[g]);
      if (e !== null) {
        if (hasMaps) drawBars(view, e, token);
        drawLegend(view, e);
      }
      drawToken(view, e ?? 0, token);
    }
    if (overview) {
      ink ??= getComputedStyle(root).color;
      overview.draw(e ?? 0, g, k, get('palette'), tables[get('palette')], ink);
      overview.mark(l, s);
      // The spectrum has thousands of points: drawn in the next frame, so that the images do not wait for it.
      if (spectrum && spectrumKey !== (spectrumKey = [l, g, k, ink].join())) requestAnimationFrame(() => spectrum.draw(l, g, data.channel(l, g, k), ink, ACCENT));
    }
    overlays.show(get('overlay'));
    leftControl.select.value = get('left'); rightControl.select.value = get('right');
    palette.select.value = get('palette'); scale.select.value = get('scale');
    code.show();
    Object.assign(root.dataset, { view: `${get('step')}/${get('site')}/${get('channel')}`, overlay: get('overlay'), draws: ++draws, ms: (performance.now() - start).toFixed(2) });
  }

  // The theme may change while the view is open: that of the browser, of JupyterLab, or of the documentation.
  const restyle = () => { ink = null; draw(); };
  const dark = matchMedia('(prefers-color-scheme: dark)'), themes = new MutationObserver(restyle);
  dark.addEventListener('change', restyle);
  for (const node of [document.documentElement, document.body]) themes.observe(node, { attributeFilter: ['data-theme', 'data-jp-theme-name', 'class'] });
  draw();
  return () => { dark.removeEventListener('change', restyle); themes.disconnect(); };
}

export default { render };
