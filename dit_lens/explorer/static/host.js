// Replaces the kernel on a page: an anywidget model that holds the state of a view. Data that is kept in pieces is decoded
// piece by piece: when the view asks for one, as it would ask the kernel, and when the browser has nothing else to do.
// The view is drawn while the browser still reads the pieces below it.
const root = document.getElementById('ID'), state = JSON.parse(document.getElementById('ID-state').textContent);
const toBytes = Uint8Array.fromBase64 ?? (text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)));
const decode = async source => {
  const compressed = toBytes.call(Uint8Array, source.textContent);
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream('gzip'));
  source.remove();
  return new DataView(await new Response(stream).arrayBuffer());
};
const find = more => document.querySelector(`script[data-for="ID"]${more}`);
const read = document.readyState === 'loading' ? new Promise(done => document.addEventListener('DOMContentLoaded', done)) : null;
const arrays = [...document.querySelectorAll('script[data-for="ID"]:not([data-block])')];
await Promise.all(arrays.map(async source => { state[source.dataset.name] = await decode(source); }));

const give = async (kind, block) => {
  const piece = `[data-name="data_${kind}"][data-block="${block}"]`;
  if (!find(piece)) await read;
  const source = find(piece);
  if (!source) return;
  source.removeAttribute('data-for');
  const data = await decode(source);
  for (const listener of listeners.get('msg:custom') ?? []) listener({ kind, block }, [data]);
};
const listeners = new Map();
const change = (name, value) => {
  if (state[name] === value) return;
  state[name] = value;
  for (const listener of listeners.get(`change:${name}`) ?? []) listener();
};

// How the view of a page of its own differs from the page as it was written stands in its address, after #.
const names = root.dataset.address === undefined ? [] : Object.keys(state.data_info.initial ?? {});
const initial = Object.fromEntries(names.map(name => [name, state[name]]));
const readAddress = () => {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(initial)) {
    const text = found.get(name);
    change(name, text === null ? value : typeof value === 'number' ? Number(text) : text);
  }
};
const writeAddress = () => {
  const changed = Object.entries(initial).filter(([name, value]) => state[name] !== value).map(([name]) => [name, state[name]]);
  history.replaceState(null, '', `#${new URLSearchParams(changed)}`);
};
if (location.hash.length > 1) readAddress();
window.addEventListener('hashchange', readAddress);

let queue = Promise.resolve(), first;
const model = {
  alone: true,
  get: name => state[name] ?? new DataView(new ArrayBuffer(0)),  // pieces arrive later
  set: change,
  on: (event, listener) => listeners.set(event, [...(listeners.get(event) ?? []), listener]),
  off: event => listeners.delete(event),
  save_changes() { if (root.dataset.address !== undefined) writeAddress(); },
  // One after the other, as what is asked for first is shown first.
  send({ kind, block }) { queue = queue.then(() => give(kind, block)); first ??= queue; },
};
const module = await import(URL.createObjectURL(new Blob([JSON.parse(document.getElementById('ID-module').textContent)], { type: 'text/javascript' })));
module.default.render({ model, el: root });
await first;
root.dataset.ready = performance.now().toFixed();  // milliseconds since the page was opened
await read;
const idle = window.requestIdleCallback ?? (work => setTimeout(work, 20));
const giveNext = async () => {
  const source = find('[data-block]');
  if (!source) { root.dataset.complete = performance.now().toFixed(); return; }
  await give(source.dataset.name.slice('data_'.length), +source.dataset.block);
  idle(giveNext);
};
idle(giveNext);
