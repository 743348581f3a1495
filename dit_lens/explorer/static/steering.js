// The steering panel: source, target and result, controls, and a strip of all results.

const CONTROLS = ['source', 'target', 'strength', 'arm', 'k', 'blocks', 'steps', 'where', 'mask'];
const PATIENCE = 5000;  // milliseconds until a kernel that does not answer is said to be busy or gone

function imageUrl(data) { return URL.createObjectURL(new Blob([data], { type: 'image/webp' })); }

function figure(name, ...below) {
  const image = make('img', { alt: name }), caption = make('figcaption', {}, ...below);
  return { node: make('figure', {}, make('div', { className: 'frame' }, image), caption), image, caption, name };
}

// A prompt to write; Enter or leaving the box sends it.
function promptBox(name, onChange) {
  const box = make('textarea', { rows: 3, 'aria-label': `prompt of the ${name}`, spellcheck: false });
  box.addEventListener('change', () => onChange(box.value.trim()));
  box.addEventListener('keydown', event => {
    event.stopPropagation();
    if (event.key !== 'Enter' || event.shiftKey) return;
    event.preventDefault();
    box.blur();
  });
  return box;
}

// Two sliders for the first and last index of a half-open interval [start, end).
function intervalSliders(name, length, onInput) {
  let ends = [0, length];
  const first = slider(`first ${name}`, { max: length - 1, onInput: value => set([value, Math.max(ends[1], value + 1)]) });
  const last = slider(`last ${name}`, { max: length - 1, onInput: value => set([Math.min(ends[0], value), value + 1]) });
  const set = value => { ends = value; onInput(ends); };
  return { rows: [first.row, last.row], show: (value, format = String) => { ends = value; first.show(value[0], format(value[0])); last.show(value[1] - 1, format(value[1] - 1)); } };
}

// A button that does something for as long as it is pressed, with the pointer or a key.
function holdButton(text, begin, end) {
  const button = make('button', { type: 'button', 'aria-pressed': 'false' }, text);
  let held = false;
  const hold = event => { if (event.repeat) return; held = true; button.setAttribute('aria-pressed', 'true'); begin(); };
  const release = () => { if (!held) return; held = false; button.setAttribute('aria-pressed', 'false'); end(); };
  const isKey = event => event.key === ' ' || event.key === 'Enter';
  button.addEventListener('pointerdown', hold);
  for (const name of ['pointerup', 'pointerleave', 'pointercancel', 'blur']) button.addEventListener(name, release);
  button.addEventListener('keydown', event => { if (isKey(event)) { event.preventDefault(); hold(event); } });
  button.addEventListener('keyup', event => { if (isKey(event)) release(); });
  return button;
}

const percent = share => `${Math.round(100 * share)} %`;

// How an image compares with source and target.
function measure({ distances, fidelity }) {
  const far = `RMSE to the target ${distances[1].toFixed(1)}, to the source ${distances[0].toFixed(1)} (of 255).`;
  if (!fidelity) return far;
  return `${far} ${fidelity.readable ? `Attributes right: ${percent(fidelity.shares[1])} of the target’s, ${percent(fidelity.shares[0])} of the source’s.` : 'It cannot be read back.'}`;
}

function render({ model, el }) {
  const info = model.get('data_info'), starts = [], results = [];
  let busy = false, changedSince = false, current = -1, start = 0;
  const change = stateful(model, CONTROLS, () => draw());
  // Draws when no control has moved for a quarter of a second.
  let timer, patience;
  const changed = changes => { change(changes); clearTimeout(timer); timer = setTimeout(requestImage, 250); };
  const setting = () => Object.fromEntries(CONTROLS.map(name => [name, model.get(name)]));

  const prompts = { source: promptBox('source', source => changed({ source })), target: promptBox('target', target => changed({ target })) };
  const source = figure('source', make('b', {}, 'source'), prompts.source), target = figure('target', make('b', {}, 'target'), prompts.target);
  const said = make('div', { className: 'said', role: 'status', 'aria-live': 'polite' }), caption = make('div');
  const compare = holdButton('Hold to compare', () => { result.image.src = target.image.src; root.dataset.comparing = '1'; }, () => { delete root.dataset.comparing; showImage(); });
  const result = figure('result', make('b', {}, 'target with channels of the source'), caption, said, compare);

  const strength = slider('strength', { max: 1, step: 0.05, onInput: value => changed({ strength: value }) });
  const size = slider('channels', { min: 1, max: info.largest, onInput: value => changed({ k: value }) });
  const blocks = intervalSliders('block', info.depth, value => changed({ blocks: value }));
  const steps = intervalSliders('step', info.sigmas.length, value => changed({ steps: value }));
  const arms = toggles('which channels', info.arms.map(name => [name, name]), arm => changed({ arm }));
  const where = toggles('where', info.where.map(name => [name, name]), value => value === 'brush' && !model.get('mask').length ? change({ where: value }) : changed({ where: value }));
  const brush = new Brush(info.grid, [source, target, result], mask => (mask.length ? changed : change)({ mask }));
  const radius = slider('brush', { max: 4, onInput: value => { brush.radius = value; draw(); } });
  const clear = make('button', { type: 'button' }, 'Clear'), invert = make('button', { type: 'button' }, 'Invert');
  clear.addEventListener('click', () => brush.clear());
  invert.addEventListener('click', () => brush.invert());
  const brushing = make('div', { className: 'side' }, radius.row, make('div', { className: 'top' }, clear, invert, make('span', { className: 'hint' }, 'Paint on an image; begin on a marked token to take away.')));
  const redraw = make('button', { type: 'button' }, 'Draw');
  redraw.addEventListener('click', requestImage);
  const status = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' });

  const strip = make('div', { className: 'strip', role: 'group', 'aria-label': 'results' });
  const code = codeBox(() => results[current]?.code ?? '');
  const controls = make('fieldset', { className: 'controls', 'aria-label': 'edit' },
    make('div', { className: 'side' }, strength.row, size.row, arms.row, where.row, brushing),
    make('div', { className: 'side' }, ...blocks.rows, ...steps.rows, make('div', { className: 'top' }, redraw, status)));
  const root = region('dit_lens steering', make('div', { className: 'panes' }, source.node, target.node, result.node), controls, strip, code.row);
  el.classList.add('dit-lens-host');
  el.append(root);

  // Without a kernel nothing can be drawn: what would draw is switched off.
  if (model.alone) {
    controls.disabled = true;
    prompts.source.readOnly = prompts.target.readOnly = true;
    root.prepend(make('p', { className: 'notice', role: 'note' }, 'This page has no kernel. It shows what was drawn, and the code that draws it; its controls are switched off.'));
  }

  // One image at a time; if the controls move meanwhile, their last setting is drawn next.
  function requestImage() {
    if (model.alone) return;
    if (busy) { changedSince = true; return; }
    busy = true;
    status.textContent = 'drawing …';
    root.dataset.busy = '1';
    clearTimeout(patience);
    patience = setTimeout(() => { status.textContent = 'No answer from the kernel: it is busy with something else, or has stopped.'; }, PATIENCE);
    model.send({ kind: 'draw', setting: setting() });
  }

  function finish(text, failed = false) {
    busy = false;
    clearTimeout(patience);
    delete root.dataset.busy;
    status.textContent = text;
    status.classList.toggle('failed', failed);
    if (changedSince) { changedSince = false; requestImage(); }
  }

  const spell = entry => `${entry.arm === 'all' ? 'all channels' : `${entry.arm} ${entry.k}`}, ${entry.strength}, blocks ${entry.blocks[0]}–${entry.blocks[1] - 1}, steps ${entry.steps[0]}–${entry.steps[1] - 1}` +
    ({ subject: ', subject', brush: `, ${entry.mask.length} tokens` }[entry.where] ?? '');

  // Source and target of some results.
  function addStart(number, texts, files) {
    starts[number] = { texts, urls: files.map(imageUrl) };
    showStart(number);
  }

  function showStart(number) {
    start = number;
    [source, target].forEach((one, i) => { one.image.src = starts[number].urls[i]; one.image.alt = `${one.name}: ${starts[number].texts[i]}`; });
    if (!results.some(entry => entry?.start === number)) result.image.src = target.image.src;
  }

  function add(entry, data) {
    results[entry.number] = entry;
    entry.url = imageUrl(data);
    const button = make('button', { type: 'button', className: 'entry', title: measure(entry) }, make('img', { src: entry.url, alt: '' }), make('span', {}, spell(entry)));
    button.addEventListener('click', () => { change(Object.fromEntries(CONTROLS.map(name => [name, entry[name]]))); show(entry.number); });
    strip.prepend(button);
    entry.button = button;
    show(entry.number);
  }

  const showImage = () => { result.image.src = results[current]?.url ?? target.image.src; };

  function show(number) {
    const entry = results[number];
    current = number;
    for (const one of results) one?.button.setAttribute('aria-pressed', String(one.number === number));
    if (entry.start !== start) showStart(entry.start);
    showImage();
    caption.textContent = result.image.alt = spell(entry);
    said.textContent = measure(entry);
    code.show();
    root.dataset.results = results.length;
    root.dataset.current = number;
  }

  function draw() {
    for (const [name, box] of Object.entries(prompts)) if (!box.matches(':focus')) box.value = model.get(name);
    strength.show(model.get('strength'), model.get('strength').toFixed(2));
    size.show(model.get('k'), model.get('k'));
    blocks.show(model.get('blocks'));
    steps.show(model.get('steps'), s => `${s}  σ ${+info.sigmas[s].toPrecision(3)}`);
    arms.show(model.get('arm'));
    where.show(model.get('where'));
    root.classList.toggle('brushing', model.get('where') === 'brush' && !model.alone);
    brushing.hidden = model.get('where') !== 'brush';
    radius.show(brush.radius, brush.radius ? `${2 * brush.radius + 1} tokens` : '1 token');
    brush.set(model.get('where') === 'brush' ? model.get('mask') : []);
  }

  model.on('msg:custom', (message, buffers) => {
    if (message.kind === 'error') finish(message.text, true);
    else if (message.kind === 'started') { clearTimeout(patience); status.textContent = 'drawing …'; }
    else if (message.kind === 'start' && !starts[message.number]) addStart(message.number, message.prompts, buffers.map(bytes));
    else if (message.kind === 'result' && !results[message.number]) {
      add(message, bytes(buffers[0]));
      finish(`${message.seconds.toFixed(1)} s`);
    }
  });
  let from = 0;
  const files = bytes(model.get('data_images')), take = length => files.slice(from, from += length);
  for (const [number, one] of model.get('data_starts').entries()) addStart(number, one.prompts, one.lengths.map(take));
  for (const [number, entry] of model.get('data_results').entries()) add({ ...entry, number }, take(entry.length));
  draw();
  // Requests what was drawn since. A page without a kernel has no more than the above.
  model.send({ kind: 'open' });
  root.dataset.open = '1';
}

export default { render };
