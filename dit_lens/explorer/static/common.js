// Shared by the widgets of dit_lens. A widget's module is this file and its own files, joined; nothing is imported.

const bytes = value => new Uint8Array(value.buffer ?? value, value.byteOffset ?? 0, value.byteLength);
// Copies, because an array of four-byte numbers must begin at a multiple of four.
const numbers = (Type, value) => new Type(bytes(value).slice().buffer);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

const FOCUSABLE = new Set(['button', 'canvas', 'input', 'select', 'summary']);

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  // Keeps JupyterLab from using the arrow keys while the element has the focus.
  if (FOCUSABLE.has(tag)) node.setAttribute('data-lm-suppress-shortcuts', 'true');
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'role' || name === 'for') node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

const region = (name, ...children) => make('div', { className: 'dit-lens', role: 'region', 'aria-label': name }, ...children);

let ids = 0;
const uniqueId = () => `dit-lens-${++ids}`;

function slider(label, { min = 0, max, step = 1, value, onInput }) {
  const id = uniqueId();
  const input = make('input', { type: 'range', id, min, max, step, value, 'aria-label': label });
  const output = make('output', { htmlFor: id, 'aria-live': 'off' });
  input.addEventListener('input', () => onInput(+input.value));
  const row = make('div', { className: 'slider' }, make('label', { htmlFor: id }, label), input, output);
  return { row, input, show: (at, text) => { input.value = at; output.value = text; input.setAttribute('aria-valuetext', text); } };
}

// A button that repeats an action until it is clicked again.
function playButton(milliseconds, act) {
  const button = make('button', { type: 'button', className: 'play' });
  let timer = null;
  const show = () => { button.textContent = timer === null ? '▶' : '⏸'; button.setAttribute('aria-label', timer === null ? 'play' : 'pause'); };
  const stop = () => { clearInterval(timer); timer = null; show(); };
  button.addEventListener('click', () => { if (timer !== null) stop(); else { act(); timer = setInterval(() => button.isConnected ? act() : stop(), milliseconds); show(); } });
  show();
  return { button, stop };
}

function numberField(label, { min = 0, max, onEnter }) {
  const input = make('input', { type: 'number', min, max, 'aria-label': `number of the ${label}` });
  input.addEventListener('change', () => { if (input.value !== '') onEnter(Math.round(+input.value)); });
  return { row: make('label', { className: 'choice' }, make('span', {}, label), input), input };
}

// A text whose middle is left out, as texts of prompts differ at their ends.
const shorten = text => text.length > 40 ? `${text.slice(0, 14)} … ${text.slice(-21)}` : text;

function choice(label, options, onChange) {
  const select = make('select', { 'aria-label': label }, ...options.map(([value, text]) => make('option', { value, title: text }, shorten(text))));
  select.addEventListener('change', () => onChange(select.value));
  const row = make('label', { className: 'choice' }, make('span', {}, label), select);
  return { row, select };
}

function toggles(label, options, onChoose) {
  const buttons = options.map(([value, text]) => {
    const button = make('button', { type: 'button', 'aria-pressed': 'false' }, text);
    button.addEventListener('click', () => onChoose(value));
    return button;
  });
  const row = make('div', { className: 'toggles', role: 'group', 'aria-label': label }, ...buttons);
  const show = chosen => options.forEach(([value], i) => buttons[i].setAttribute('aria-pressed', String(value === chosen)));
  return { row, show };
}

function codeBox(text) {
  const code = make('code'), button = make('button', { type: 'button' }, 'Copy');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = 'Copied';
    } catch {
      // The clipboard may not be written: selects the code instead.
      getSelection().selectAllChildren(code);
      button.textContent = 'Selected';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
  const row = make('details', { className: 'code' }, make('summary', {}, 'The code that made this'), make('div', {}, make('pre', {}, code), button));
  const show = () => { code.textContent = text(); };
  row.addEventListener('toggle', show);
  return { row, show: () => { if (row.open) show(); } };
}

// Returns a function that changes the state, draws immediately, and sends the change to Python a moment later, so that a
// slider never waits for Python.
function stateful(model, names, draw, delay = 120) {
  let timer, setting = false;
  for (const name of names) model.on(`change:${name}`, () => { if (!setting) draw(); });
  return changes => {
    setting = true;
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    setting = false;
    draw();
    clearTimeout(timer);
    timer = setTimeout(() => model.save_changes(), delay);
  };
}

// The value as Python code.
function toPython(value) {
  if (typeof value === 'string') return `'${value.replace(/\\/g, '\\\\').replace(/'/g, "\\'")}'`;
  return String(value);
}
