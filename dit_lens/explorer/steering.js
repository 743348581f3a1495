// Live steering: controls on the left, source, target and result, and a strip of everything that was drawn.

const CONTROLS = ['strength', 'arm', 'k', 'blocks', 'steps', 'where'];

function imageUrl(data) { return URL.createObjectURL(new Blob([data], { type: 'image/webp' })); }

function image(caption, url) {
  const image = make('img', { alt: caption, ...(url ? { src: url } : {}) });
  return { node: make('figure', {}, image, make('figcaption', {}, caption)), image };
}

// Two sliders that keep a half-open interval in order.
function interval(name, length, onInput) {
  let ends = [0, length];
  const from = slider(`first ${name}`, { max: length - 1, onInput: value => set([value, Math.max(ends[1], value + 1)]) });
  const to = slider(`last ${name}`, { max: length - 1, onInput: value => set([Math.min(ends[0], value), value + 1]) });
  const set = value => { ends = value; onInput(ends); };
  return { rows: [from.row, to.row], show: (value, say = String) => { ends = value; from.show(value[0], say(value[0])); to.show(value[1] - 1, say(value[1] - 1)); } };
}

function render({ model, el }) {
  const meta = model.get('_meta'), ends = bytes(model.get('_ends')), shots = [];
  let busy = false, again = false, current = -1;
  const change = stateful(model, CONTROLS, () => draw());
  // Drawn when a control rests.
  let resting;
  const changed = changes => { change(changes); clearTimeout(resting); resting = setTimeout(ask, 250); };
  const setting = () => Object.fromEntries(CONTROLS.map(name => [name, model.get(name)]));

  const strength = slider('strength', { max: 1, step: 0.05, onInput: value => changed({ strength: value }) });
  const size = slider('channels', { min: 1, max: meta.largest, onInput: value => changed({ k: value }) });
  const blocks = interval('block', meta.depth, value => changed({ blocks: value }));
  const steps = interval('step', meta.sigmas.length, value => changed({ steps: value }));
  const arms = toggles('which channels', meta.arms.map(name => [name, name]), arm => changed({ arm }));
  const where = toggles('where', meta.where.map(name => [name, name]), value => changed({ where: value }));
  const redraw = make('button', { type: 'button' }, 'Draw');
  redraw.addEventListener('click', ask);
  const status = make('div', { className: 'token', role: 'status', 'aria-live': 'polite' });

  const source = image(`source: ${meta.prompts[0]}`, imageUrl(ends.slice(0, meta.split)));
  const target = image(`target: ${meta.prompts[1]}`, imageUrl(ends.slice(meta.split)));
  const result = image('target with channels of the source');
  const strip = make('div', { className: 'strip', role: 'group', 'aria-label': 'what was drawn' });
  const code = codeBox(() => shots[current]?.code ?? '');
  const root = frame('dit_lens steering',
    make('div', { className: 'panes' }, source.node, target.node, result.node),
    make('div', { className: 'controls' },
      make('div', { className: 'side' }, strength.row, size.row, arms.row, where.row),
      make('div', { className: 'side' }, ...blocks.rows, ...steps.rows, make('div', { className: 'top' }, redraw, status))),
    strip, code.row);
  el.append(root);

  // One drawing at a time; what was moved meanwhile is drawn next.
  function ask() {
    if (busy) { again = true; return; }
    busy = true;
    status.textContent = 'drawing …';
    root.dataset.busy = '1';
    model.send({ kind: 'draw', setting: setting() });
  }

  function settled(text) {
    busy = false;
    delete root.dataset.busy;
    status.textContent = text;
    if (again) { again = false; ask(); }
  }

  const say = shot => `${shot.arm === 'all' ? 'all channels' : `${shot.arm} ${shot.k}`}, ${shot.strength}, blocks ${shot.blocks[0]}–${shot.blocks[1] - 1}, steps ${shot.steps[0]}–${shot.steps[1] - 1}${shot.where === 'subject' ? ', subject' : ''}`;

  function add(shot, data) {
    shots[shot.number] = shot;
    shot.url = imageUrl(data);
    const button = make('button', { type: 'button', className: 'shot' }, make('img', { src: shot.url, alt: '' }), make('span', {}, say(shot)));
    button.addEventListener('click', () => { change(Object.fromEntries(CONTROLS.map(name => [name, shot[name]]))); show(shot.number); });
    strip.prepend(button);
    shot.button = button;
    show(shot.number);
  }

  function show(number) {
    current = number;
    for (const shot of shots) shot?.button.setAttribute('aria-pressed', String(shot.number === number));
    result.image.src = shots[number].url;
    result.image.alt = say(shots[number]);
    code.show();
    root.dataset.shots = shots.length;
    root.dataset.current = number;
  }

  function draw() {
    strength.show(model.get('strength'), model.get('strength').toFixed(2));
    size.show(model.get('k'), model.get('k'));
    blocks.show(model.get('blocks'));
    steps.show(model.get('steps'), s => `${s}  σ ${+meta.sigmas[s].toPrecision(3)}`);
    arms.show(model.get('arm'));
    where.show(model.get('where'));
  }

  model.on('msg:custom', (message, buffers) => {
    if (message.kind === 'problem') settled(message.text);
    else if (message.kind === 'shot' && !shots[message.number]) {
      add(message, bytes(buffers[0]));
      settled(`${message.seconds.toFixed(1)} s`);
    }
  });
  draw();
  let from = 0;
  const album = bytes(model.get('_album'));
  for (const [number, shot] of model.get('_shots').entries()) {
    add({ ...shot, number }, album.slice(from, from += shot.length));
  }
  result.image.src ||= target.image.src;
  // On a page without a kernel this goes nowhere, and the strip is what there is.
  model.send({ kind: 'open' });
  root.dataset.open = '1';
}

export default { render };
