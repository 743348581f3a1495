// Stands in for a kernel: a model that holds a view's state, for a page that is opened from disk.
const text = id => document.getElementById(id).textContent;
const state = JSON.parse(text('ID-state'));
for (const source of document.querySelectorAll('script[data-for="ID"]')) {
  const packed = Uint8Array.from(atob(source.textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  state[source.dataset.name] = new DataView(await new Response(stream).arrayBuffer());
}
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
  send() {},
};
const module = await import(URL.createObjectURL(new Blob([JSON.parse(text('ID-module'))], { type: 'text/javascript' })));
module.default.render({ model, el: document.getElementById('ID') });
document.getElementById('ID').dataset.ready = '1';
