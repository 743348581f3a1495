"""Interactive views of a run (``explore``), of prompts (``atlas``) and of edits (``steer``); import all from here.

    run = lens.run(prompt, [dl.Read("blocks.*.img")], seed=0)
    dl.explore(run)                                        # in a notebook
    dl.explore(run).to_html("circle.html")                 # one file, no kernel, no network

A view is an anywidget: one JavaScript module that uses no network. It has all arrays in the browser, so that moving a
slider does not wait for Python.
"""

from dit_lens.explorer.atlas import atlas
from dit_lens.explorer.explorer import Explorer, explore
from dit_lens.explorer.runs import explorer_reads
from dit_lens.explorer.steering import Setting, Steer, steer
from dit_lens.explorer.views import Views

__all__ = ["Explorer", "Setting", "Steer", "Views", "atlas", "explore", "explorer_reads", "steer"]
