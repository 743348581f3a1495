// Replaces the kernel on a page: an anywidget model that holds the state of a view.
const text = id => document.getElementById(id).textContent;
const state = JSON.parse(text('ID-state'));
for (const source of document.querySelectorAll('script[data-for="ID"]')) {
  const compressed = Uint8Array.from(atob(source.textContent), character => character.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream('gzip'));
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
