// Replaces the kernel on a page: an anywidget model that holds the state of a view. Data that is kept in pieces is decoded
// piece by piece: when the view asks for one, as it would ask the kernel, and when the browser has nothing else to do.
const text = id => document.getElementById(id).textContent;
const state = JSON.parse(text('ID-state'));
const decode = async source => {
  const letters = atob(source.textContent), compressed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) compressed[i] = letters.charCodeAt(i);
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new DataView(await new Response(stream).arrayBuffer());
};
const pieces = new Map();
for (const source of document.querySelectorAll('script[data-for="ID"]')) {
  const { name, block } = source.dataset;
  if (block === undefined) { state[name] = await decode(source); continue; }
  state[name] = new DataView(new ArrayBuffer(0));
  pieces.set(name + block, source);
}
const asked = [];
const give = async message => {
  const key = `data_${message.kind}${message.block}`, source = pieces.get(key);
  if (!source) return;
  pieces.delete(key);
  const data = await decode(source);
  for (const listener of listeners.get('msg:custom') ?? []) listener(message, [data]);
};
const listeners = new Map();
const model = {
  get: name => state[name],
  set(name, value) {
    if (state[name] === value) return;
    state[name] = value;
    for (const listener of listeners.get(`change:${name}`) ?? []) listener();
  },
  on: (event, listener) => listeners.set(event, [...(listeners.get(event) ?? []), listener]),
  off: event => listeners.delete(event),
  save_changes() {},
  send: message => asked.push(give(message)),
};
const module = await import(URL.createObjectURL(new Blob([JSON.parse(text('ID-module'))], { type: 'text/javascript' })));
module.default.render({ model, el: document.getElementById('ID') });
await Promise.all(asked);  // what is shown first
document.getElementById('ID').dataset.ready = '1';
const idle = window.requestIdleCallback ?? (work => setTimeout(work, 20));
const giveNext = async () => {
  const [source] = pieces.values();
  if (!source) return;
  await give({ kind: source.dataset.name.slice('data_'.length), block: +source.dataset.block });
  idle(giveNext);
};
idle(giveNext);
