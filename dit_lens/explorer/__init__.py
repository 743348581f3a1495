"""Views to explore: images under their channels (``explore``), a file to share (``atlas``), live edits (``steer``).

    run = lens.run(prompt, [dl.Read("blocks.*.img")], seed=0)
    dl.explore(run)                                        # in a notebook
    dl.explore(run).to_html("circle.html")                 # one file, no kernel, no network

A view is an anywidget: one module for the browser, no network. All arrays are sliced there, so that moving a slider
asks nothing of Python.
"""

from dit_lens.explorer.atlas import atlas
from dit_lens.explorer.explorer import Explorer, explore
from dit_lens.explorer.steering import Setting, Steer, steer
from dit_lens.explorer.views import Views, explorer_reads

__all__ = ["Explorer", "Setting", "Steer", "Views", "atlas", "explore", "explorer_reads", "steer"]
