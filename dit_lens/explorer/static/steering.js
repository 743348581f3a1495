// The steering panel: source, target and result, controls, and a strip of all results.

const CONTROLS = ['strength', 'arm', 'k', 'blocks', 'steps', 'where'];

function imageUrl(data) { return URL.createObjectURL(new Blob([data], { type: 'image/webp' })); }

function figure(caption, url) {
  const image = make('img', { alt: caption, ...(url ? { src: url } : {}) });
  return { node: make('figure', {}, image, make('figcaption', {}, caption)), image };
}

// Two sliders for the first and last index of a half-open interval [start, end).
function intervalSliders(name, length, onInput) {
  let ends = [0, length];
  const first = slider(`first ${name}`, { max: length - 1, onInput: value => set([value, Math.max(ends[1], value + 1)]) });
  const last = slider(`last ${name}`, { max: length - 1, onInput: value => set([Math.min(ends[0], value), value + 1]) });
  const set = value => { ends = value; onInput(ends); };
  return { rows: [first.row, last.row], show: (value, format = String) => { ends = value; first.show(value[0], format(value[0])); last.show(value[1] - 1, format(value[1] - 1)); } };
}

function render({ model, el }) {
  const info = model.get('data_info'), ends = bytes(model.get('data_ends')), results = [];
  let busy = false, changedSince = false, current = -1;
  const change = stateful(model, CONTROLS, () => draw());
  // Draws when no control has moved for a quarter of a second.
  let timer;
  const changed = changes => { change(changes); clearTimeout(timer); timer = setTimeout(requestImage, 250); };
  const setting = () => Object.fromEntries(CONTROLS.map(name => [name, model.get(name)]));

  const strength = slider('strength', { max: 1, step: 0.05, onInput: value => changed({ strength: value }) });
  const size = slider('channels', { min: 1, max: info.largest, onInput: value => changed({ k: value }) });
  const blocks = intervalSliders('block', info.depth, value => changed({ blocks: value }));
  const steps = intervalSliders('step', info.sigmas.length, value => changed({ steps: value }));
  const arms = toggles('which channels', info.arms.map(name => [name, name]), arm => changed({ arm }));
  const where = toggles('where', info.where.map(name => [name, name]), value => changed({ where: value }));
  const redraw = make('button', { type: 'button' }, 'Draw');
  redraw.addEventListener('click', requestImage);
  const status = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' });

  const source = figure(`source: ${info.prompts[0]}`, imageUrl(ends.slice(0, info.split)));
  const target = figure(`target: ${info.prompts[1]}`, imageUrl(ends.slice(info.split)));
  const result = figure('target with channels of the source');
  const strip = make('div', { className: 'strip', role: 'group', 'aria-label': 'results' });
  const code = codeBox(() => results[current]?.code ?? '');
  const root = region('dit_lens steering',
    make('div', { className: 'panes' }, source.node, target.node, result.node),
    make('div', { className: 'controls' },
      make('div', { className: 'side' }, strength.row, size.row, arms.row, where.row),
      make('div', { className: 'side' }, ...blocks.rows, ...steps.rows, make('div', { className: 'top' }, redraw, status))),
    strip, code.row);
  el.append(root);

  // One image at a time; if the controls move meanwhile, their last setting is drawn next.
  function requestImage() {
    if (busy) { changedSince = true; return; }
    busy = true;
    status.textContent = 'drawing …';
    root.dataset.busy = '1';
    model.send({ kind: 'draw', setting: setting() });
  }

  function finish(text) {
    busy = false;
    delete root.dataset.busy;
    status.textContent = text;
    if (changedSince) { changedSince = false; requestImage(); }
  }

  const caption = entry => `${entry.arm === 'all' ? 'all channels' : `${entry.arm} ${entry.k}`}, ${entry.strength}, blocks ${entry.blocks[0]}–${entry.blocks[1] - 1}, steps ${entry.steps[0]}–${entry.steps[1] - 1}${entry.where === 'subject' ? ', subject' : ''}`;

  function add(entry, data) {
    results[entry.number] = entry;
    entry.url = imageUrl(data);
    const button = make('button', { type: 'button', className: 'entry' }, make('img', { src: entry.url, alt: '' }), make('span', {}, caption(entry)));
    button.addEventListener('click', () => { change(Object.fromEntries(CONTROLS.map(name => [name, entry[name]]))); show(entry.number); });
    strip.prepend(button);
    entry.button = button;
    show(entry.number);
  }

  function show(number) {
    current = number;
    for (const entry of results) entry?.button.setAttribute('aria-pressed', String(entry.number === number));
    result.image.src = results[number].url;
    result.image.alt = caption(results[number]);
    code.show();
    root.dataset.results = results.length;
    root.dataset.current = number;
  }

  function draw() {
    strength.show(model.get('strength'), model.get('strength').toFixed(2));
    size.show(model.get('k'), model.get('k'));
    blocks.show(model.get('blocks'));
    steps.show(model.get('steps'), s => `${s}  σ ${+info.sigmas[s].toPrecision(3)}`);
    arms.show(model.get('arm'));
    where.show(model.get('where'));
  }

  model.on('msg:custom', (message, buffers) => {
    if (message.kind === 'error') finish(message.text);
    else if (message.kind === 'result' && !results[message.number]) {
      add(message, bytes(buffers[0]));
      finish(`${message.seconds.toFixed(1)} s`);
    }
  });
  draw();
  let from = 0;
  const images = bytes(model.get('data_images'));
  for (const [number, entry] of model.get('data_results').entries()) {
    add({ ...entry, number }, images.slice(from, from += entry.length));
  }
  result.image.src ||= target.image.src;
  // Requests the results drawn so far. A page without a kernel has no others than those above.
  model.send({ kind: 'open' });
  root.dataset.open = '1';
}

export default { render };
