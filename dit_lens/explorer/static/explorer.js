// The explorer: controls, images, overviews, and what ties them to the state. explorer_data.js explains the letters.

const ACCENT = '#D55E00', PLAY = 300;  // milliseconds of a step
const STATE = [
  'left', 'right', 'compare', 'wipe', 'under', 'step', 'site', 'group', 'channel', 'overlay', 'palette', 'scale', 'opacity', 'token',
];

// Buttons for few groups, a list for many.
function makeGroupControl(data, onChoose) {
  const names = data.groups.map(name => [name, name]), label = data.masks ? 'mask of' : 'group of channels';
  if (names.length <= 6) return toggles(label, names, onChoose);
  const { row, select } = choice(label, names, onChoose);
  return { row, show: name => { select.value = name; } };
}

// Returns span -> the decoded image at these bytes, or null until it is decoded, which starts with the first call.
function imageDecoder(files, changed) {
  const decoded = new Map();
  return span => {
    if (!span) return null;
    const key = span.join();
    if (!decoded.has(key)) {
      decoded.set(key, null);
      createImageBitmap(new Blob([files.subarray(...span)], { type: 'image/webp' })).then(bitmap => { decoded.set(key, bitmap); changed(); });
    }
    return decoded.get(key);
  };
}

// Replaces what an address asks for and the view does not have.
function settle(model, data) {
  const choices = {
    step: data.steps.map(([index]) => index), site: data.blocks, group: data.groups, palette: ['auto', ...Object.keys(data.palettes)], ...data.choices,
    left: data.panes.map((_, i) => i), right: data.panes.map((_, i) => i).concat(-1),
  };
  const ranges = { token: [-1, data.tokens - 1], opacity: [0, 1], wipe: [0, 1] };
  for (const [name, known] of Object.entries(choices)) if (!known.includes(model.get(name))) model.set(name, data.initial[name]);
  for (const [name, [low, high]] of Object.entries(ranges)) if (!(model.get(name) >= low && model.get(name) <= high)) model.set(name, data.initial[name]);
}

function render({ model, el }) {
  const data = new ExplorerData(model, () => draw()), get = name => model.get(name), change = stateful(model, STATE, () => draw());
  const hasMaps = data.K > 0 && data.mappedImages > 0, hasClusters = data.mappedImages > 0, several = data.panes.length > 1;
  const hasFrames = data.panes.some(pane => pane.mapIndex !== null && pane.frames);
  const image = imageDecoder(bytes(get('data_images')), () => draw()), layers = new Layers(data, get);
  let hovered = -1, side = 'left', draws = 0, spectrumKey = '', ink = null;

  const indices = () => {
    const l = Math.max(0, data.blocks.indexOf(get('site'))), g = Math.max(0, data.groups.indexOf(get('group')));
    const s = Math.max(0, data.steps.findIndex(([index]) => index === get('step'))), k = data.rankOf(l, g, get('channel'));
    if (k >= 0 || !hasMaps || data.labelled[data.groups[g]]) return { l, g, s, k: Math.max(0, k) };
    return { l, g, s, k: data.chooseOther(get('channel')) ? data.K : 0 };
  };
  // Shows another block or group: the same channel if it is there, otherwise the one of the same rank.
  const show = (l, g, others = {}) => {
    const { k } = indices(), kept = g === indices().g && k === data.K, number = data.K ? data.channel(l, g, k % data.K) : -1;
    const has = data.rankOf(l, g, get('channel')) >= 0 || kept;
    change({ ...others, site: data.blocks[l] ?? '', group: data.groups[g] ?? '', ...(has || !hasMaps ? {} : { channel: number >= 0 ? number : data.channel(l, g, 0) }) });
  };
  // Shows any channel: of this group, of another one, or one that is read on demand.
  const showChannel = number => {
    const { l, g } = indices(), order = [g, ...data.groups.keys()].filter(i => !data.labelled[data.groups[i]]);
    const group = order.find(i => data.rankOf(l, i, number) >= 0) ?? (data.isReadable(number) ? order[0] : undefined);
    if (group === undefined) {
      const there = [...new Set(order.flatMap(i => Array.from({ length: data.K }, (_, k) => data.channel(l, i, k))))].filter(c => c >= 0).sort((a, b) => a - b);
      notice.textContent = `There is no map of channel ${number} here: ${there.length > 40 ? `${there.length} channels were kept` : there.join(', ')}.`;
      draw();
    } else change({ group: data.groups[group], channel: number });
  };
  const selectIn = name => (n, keep) => {
    if (n >= 0) side = name;
    if (keep) change({ token: n === get('token') ? -1 : n });
    else if (n !== hovered) { hovered = n; draw(); }
  };

  const left = new Pane(data, 'left', selectIn('left')), right = new Pane(data, 'right', selectIn('right'));
  const names = data.panes.map((pane, i) => [i, pane.name]);
  const leftControl = choice('image', names, value => change({ left: +value }));
  const rightControl = choice('beside it', [[-1, 'nothing'], ...names], value => change({ right: +value }));
  const compare = toggles('compare', [['beside', 'side by side'], ['wipe', 'wipe'], ['difference', 'difference']], value => change({ compare: value }));
  const overlays = toggles('overlay', [...(hasMaps ? [['heat', 'channel']] : []), ...(hasClusters ? [['clusters', data.masks ? 'mask' : 'clusters']] : []), ['none', 'image']], overlay => change({ overlay }));
  const under = toggles('image under the map', [['step', 'image at this step'], ['end', 'final image']], value => change({ under: value }));
  const palette = choice('colours', [['auto', 'automatic'], ...Object.keys(data.palettes).map(name => [name, name])], value => change({ palette: value }));
  const scale = choice('range', [['map', several ? 'shared' : 'of this map'], ...(several ? [['own', 'each its own']] : []), ['steps', 'of all steps']], value => change({ scale: value }));
  const opacity = slider('opacity', { max: 1, step: 0.05, onInput: value => change({ opacity: value }) });
  const wipe = slider('wipe', { max: 1, step: 0.01, onInput: value => change({ wipe: value }) });
  const steps = slider('step', { max: data.steps.length - 1, onInput: s => { player.stop(); change({ step: data.steps[s][0] }); } });
  const player = playButton(PLAY, () => change({ step: data.steps[(indices().s + 1) % data.steps.length][0] }));
  steps.row.append(player.button);
  const blocks = slider('block', { max: data.blocks.length - 1, onInput: l => show(l, indices().g) });
  const groups = makeGroupControl(data, name => show(indices().l, data.groups.indexOf(name)));
  const typed = numberField('channel', { max: data.width - 1, onEnter: showChannel });
  const bars = Array.from({ length: data.K + 1 }, (_, k) => {
    const name = make('span'), bar = make('i'), value = make('b');
    const button = make('button', { type: 'button', className: 'bar', 'aria-pressed': 'false' }, name, make('span', { className: 'track' }, bar), value);
    button.addEventListener('click', () => { const { l, g } = indices(); change({ channel: data.channel(l, g, k) }); });
    return { button, name, bar, value };
  });
  const legend = make('div', { className: 'legend' }), heading = make('div', { className: 'heading' });
  const about = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' }), notice = make('div', { className: 'notice', role: 'alert' });
  const overview = hasMaps ? new Overview(data, (l, s) => show(l, indices().g, { step: data.steps[s][0] })) : null;
  const spectrum = data.scores.length ? new Spectrum(data, showChannel) : null;
  const code = codeBox(() => data.code.replace('{state}', stateCode()));
  const picture = make('button', { type: 'button', title: 'Save this view as an image' }, 'PNG');
  picture.addEventListener('click', () => savePicture(root, [left, right], legendItems(indices()), fileName()));

  const stateCode = () => STATE.filter(name => get(name) !== data.initial[name]).map(name => `, ${name}=${toPython(get(name))}`).join('');
  const fileName = () => ['dit_lens', get('site'), hasClusters ? `step-${get('step')}` : '', get('overlay') === 'heat' ? data.name(indices().g, get('channel')) : get('overlay')].filter(Boolean).join('-').replace(/[^\w.-]+/g, '-');

  const part = (title, ...nodes) => make('div', { className: 'part' }, make('h4', {}, title), ...nodes);
  const overviewTitle = make('h4');
  const root = region('dit_lens explorer',
    make('div', { className: 'top' }, ...(several ? [leftControl.row, rightControl.row, compare.row] : []), overlays.row, ...(hasFrames ? [under.row] : []), ...(hasMaps ? [palette.row, scale.row] : []), picture),
    make('div', { className: 'stage' },
      make('div', { className: 'panes' }, left.node, right.node),
      make('div', { className: 'side' },
        wipe.row, ...(data.blocks.length > 1 ? [blocks.row] : []), ...(data.steps.length > 1 ? [steps.row] : []), ...(hasClusters ? [opacity.row] : []),
        ...(hasClusters ? [make('div', { className: 'top' }, groups.row, ...(data.width ? [typed.row] : []))] : []),
        heading, make('div', { className: 'bars' }, ...bars.map(bar => bar.button)), legend, notice, about)),
    make('div', { className: 'below' },
      ...(overview ? [make('div', { className: 'part' }, overviewTitle, overview.node)] : []),
      ...(spectrum ? [part('score |mean| of every channel, by rank: click to choose', spectrum.canvas)] : [])),
    ...(data.note ? [make('p', { className: 'token' }, data.note)] : []), code.row);
  el.classList.add('dit-lens-host');
  el.append(root);

  // What the two panes show: images e with maps, or null.
  const mapped = name => data.panes[get(name)]?.mapIndex ?? null;
  const comparing = mode => get('compare') === mode && Boolean(data.panes[get('right')]);

  // Images whose maps share a range: a difference has its own.
  const sharing = () => [mapped('left'), comparing('difference') ? null : mapped('right')].filter(one => one !== null);

  function layerOf(name, view) {
    const e = mapped(name), other = mapped('left'), minus = name === 'right' && comparing('difference');
    if (e === null || get('overlay') === 'none' || (minus && other === null)) return null;
    if (get('overlay') === 'clusters') return layers.regions(view, e, minus ? other : null);
    const found = minus ? layers.difference(view, e, other) : layers.heat(view, e, sharing());
    return found && layers.paint(found);
  }

  function imageOf(name, s) {
    const shown = data.panes[get(name)];
    if (!shown) return null;
    const frame = shown.frames?.[s];
    return image(frame && (shown.mapIndex === null || get('under') === 'step') ? frame : shown.bytes);
  }

  function drawPane(pane, name, view, token) {
    const shown = data.panes[get(name)], e = mapped(name), minus = name === 'right' && comparing('difference');
    pane.node.hidden = !shown || (name === 'right' && comparing('wipe'));
    if (!shown) return;
    const overlay = layerOf(name, view), { l, s, g } = view;
    const neighbours = token >= 0 && e !== null && hasMaps ? data.neighbours(l, e, s, g, token) : [];
    pane.draw(imageOf(name, s), overlay, get('opacity'), { token, neighbours, selected: get('token') }, minus && !overlay ? imageOf('left', s) : null);
    const covers = name === 'left' && comparing('wipe') ? ` | ${data.panes[get('right')].name}` : '';
    pane.caption.textContent = several ? (minus ? `difference: ${shown.name}, minus the image on the left` : shown.name + covers) : '';
    const where = hasClusters ? `, ${data.blocks[l]}, step ${data.steps[s][0]}` : '';
    const what = get('overlay') === 'heat' && hasMaps && e !== null ? `, ${data.name(g, data.channel(l, g, view.k))}` : '';
    pane.canvas.setAttribute('aria-label', `${minus ? 'difference: ' : ''}${shown.name}${covers}${where}${what}`);
  }

  // The values that bars and texts are about: of one image, or of a difference.
  function subject(view, token) {
    const { l, s, g } = view, e = mapped(side) ?? mapped('left') ?? mapped('right'), minus = comparing('difference') && mapped('left') !== null && mapped('right') !== null;
    const value = (one, k) => token >= 0 ? data.value(l, one, s, g, k, token) : data.mean(l, one, s, g, k);
    const name = minus ? 'right minus left' : !several || get('right') < 0 || mapped('right') === null ? '' : e === mapped('left') ? 'left image' : 'right image';
    return { e, name, value: k => minus ? value(mapped('right'), k) - value(mapped('left'), k) : value(e, k) };
  }

  function drawBars({ l, g, k }, shown, token) {
    const values = bars.map((_, i) => data.channel(l, g, i) >= 0 ? shown.value(i) : NaN);
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value) || 0), 1e-12);
    heading.textContent = [token >= 0 ? `values at token ${token}` : 'means over tokens', shown.name].filter(Boolean).join(', ');
    bars.forEach((bar, i) => {
      const channel = data.channel(l, g, i);
      bar.button.hidden = channel < 0 || (i === data.K && k !== data.K);
      bar.name.textContent = data.name(g, channel);
      bar.bar.style.width = `${100 * Math.abs(values[i] || 0) / largest}%`;
      bar.bar.className = values[i] < 0 ? 'negative' : '';
      bar.value.textContent = threeDigits(values[i]);
      bar.button.setAttribute('aria-pressed', String(i === k));
    });
  }

  // The colours that are shown: [{ name, range, palette }], one for both images if they share a range.
  function legendItems(view) {
    if (get('overlay') !== 'heat' || !hasMaps) return [];
    const shown = ['left', 'right'].filter(name => mapped(name) !== null), es = shown.map(mapped), found = [];
    for (const [i, name] of shown.entries()) {
      const minus = name === 'right' && comparing('difference') && es.length > 1;
      if (data.channel(view.l, view.g, view.k) < 0 || !Number.isFinite(data.range(view.l, es[i], view.s, view.g, view.k)[0])) continue;
      const layer = minus ? layers.difference(view, es[1], es[0]) : layers.colours(view, es[i], sharing());
      const same = found.find(item => item.range.join() === layer?.range.join() && item.palette === layer.palette && !minus);
      if (same) same.name = '';
      else if (layer) found.push({ ...layer, colours: layers.stops(layer.palette), name: minus ? 'difference' : es.length > 1 ? `${name} image` : '' });
    }
    return found;
  }

  function drawLegend(view, e) {
    const { l, s, g } = view;
    if (get('overlay') === 'heat') {
      legend.replaceChildren(...legendItems(view).map(({ name, range, colours }) => make('div', { className: 'scale' },
        ...(name ? [make('span', {}, name)] : []), threeDigits(range[0]), make('i', { style: `background: linear-gradient(to right, ${colours.join(', ')})` }), threeDigits(range[1]))));
    } else if (get('overlay') === 'clusters') {
      const labels = data.labels(l, e, s, g), counts = new Map();
      for (const label of labels ?? []) counts.set(label, (counts.get(label) ?? 0) + 1);
      const called = data.masks ? ['outside', 'inside'] : ['coldest', ...(counts.size > 2 ? Array(counts.size - 2).fill('') : []), 'hottest'];
      const known = [...counts].filter(([label]) => label !== NO_CLUSTER).sort();
      legend.replaceChildren(...known.map(([label, count]) => make('span', { className: 'key' },
        make('i', { style: `background: rgb(${data.clusterColours[label % data.clusterColours.length]})` }), `${called[label] ?? label}: ${count} tokens`)));
      if (!labels) legend.textContent = 'K-means …';
    } else legend.replaceChildren();
  }

  function drawToken({ l, s, g }, e, token) {
    if (token < 0) { about.textContent = hasMaps ? 'Hatched: negative. Point at a token for its values; click to keep it.' : ''; return; }
    const labels = get('overlay') === 'clusters' && data.labels(l, e, s, g), neighbours = hasMaps ? data.neighbours(l, e, s, g, token) : [];
    const place = n => `${Math.floor(n / data.w)}, ${n % data.w}`;
    about.textContent = `Token ${token} (row ${Math.floor(token / data.w)}, column ${token % data.w})` +
      (labels ? `, ${data.masks ? ['outside', 'inside'][labels[token]] ?? 'no mask' : `cluster ${labels[token]}`}` : '') +
      (hasMaps ? `. Nearest in these channels (row, column): ${neighbours.map(place).join('; ')}.` : '.');
  }

  function drawOverview(view, e) {
    const { l, s, g, k } = view, minus = comparing('difference') && mapped('left') !== null && mapped('right') !== null;
    ink ??= getComputedStyle(root).color;
    overview.draw(layers, view, minus ? mapped('right') : e ?? 0, minus ? mapped('left') : null, ink);
    overview.mark(l, s);
    const whose = minus ? ', right minus left' : get('right') >= 0 && mapped('right') !== null && e !== null ? `, ${e === mapped('left') ? 'left' : 'right'} image` : '';
    overviewTitle.textContent = `blocks (down) and steps (across)${whose}: ${get('scale') === 'steps' && !minus ? 'one range for each block' : 'each map in its own range'}`;
    // The spectrum has thousands of points: drawn in the next frame, so that the images do not wait for it.
    const number = data.labelled[data.groups[g]] ? -1 : data.channel(l, g, k);
    if (spectrum && spectrumKey !== (spectrumKey = [l, g, number, ink].join())) requestAnimationFrame(() => spectrum.draw(l, g, number, ink, ACCENT));
  }

  function draw() {
    if (model.alone) settle(model, data);
    const start = performance.now(), view = indices(), { l, s, g, k } = view, token = get('token') >= 0 ? get('token') : hovered;
    drawPane(left, 'left', view, token);
    drawPane(right, 'right', view, token);
    if (comparing('wipe')) left.cover(right, get('wipe'));
    root.classList.toggle('double', !right.node.hidden);
    compare.row.hidden = get('right') < 0;
    wipe.row.hidden = !comparing('wipe');
    wipe.show(get('wipe'), `${Math.round(100 * get('wipe'))} %`);
    const shown = subject(view, token), e = mapped('left') ?? mapped('right');
    if (hasClusters) {
      steps.show(s, `${data.steps[s][0]}${data.steps[s][1] === null ? '' : `  σ ${threeDigits(data.steps[s][1])}`}`);
      blocks.show(l, shortName(data.blocks[l]));
      opacity.show(get('opacity'), `${Math.round(100 * get('opacity'))} %`);
      groups.show(data.groups[g]);
      if (e !== null) {
        if (hasMaps) drawBars(view, shown, token);
        drawLegend(view, shown.e);
      }
      drawToken(view, shown.e ?? 0, token);
    }
    if (hasMaps) {
      const missing = !data.labelled[data.groups[g]] && get('channel') >= 0 && k < data.K && data.channel(l, g, k) !== get('channel');
      if (missing) notice.textContent = data.isReadable(get('channel')) ? `reading channel ${get('channel')} …` : `Channel ${get('channel')} was not kept of ${data.blocks[l]}; shown is ${data.name(g, data.channel(l, g, k))}.`;
      else if (notice.dataset.view !== `${l} ${g} ${get('channel')}`) notice.textContent = '';
      notice.dataset.view = `${l} ${g} ${get('channel')}`;
      if (!typed.input.matches(':focus')) typed.input.value = data.labelled[data.groups[g]] ? '' : data.channel(l, g, k);
      drawOverview(view, e);
    }
    overlays.show(get('overlay'));
    under.show(get('under'));
    compare.show(get('compare'));
    leftControl.select.value = get('left'); rightControl.select.value = get('right');
    palette.select.value = get('palette'); scale.select.value = get('scale');
    code.show();
    Object.assign(root.dataset, { view: `${get('step')}/${get('site')}/${data.K ? data.channel(l, g, k) : get('channel')}`, overlay: get('overlay'), draws: ++draws, ms: (performance.now() - start).toFixed(2) });
  }

  // The theme may change while the view is open: that of the browser, of JupyterLab, or of the documentation.
  const restyle = () => { ink = null; draw(); };
  const dark = matchMedia('(prefers-color-scheme: dark)'), themes = new MutationObserver(restyle);
  dark.addEventListener('change', restyle);
  for (const node of [document.documentElement, document.body]) themes.observe(node, { attributeFilter: ['data-theme', 'data-jp-theme-name', 'class', 'theme'] });
  draw();
  return () => { player.stop(); dark.removeEventListener('change', restyle); themes.disconnect(); };
}

export default { render };
