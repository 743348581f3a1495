"""Interactive views of a run (``explore``), prompts (``atlas``) and edits (``steer``): import everything from here."""

from dit_lens.explorer.atlas import atlas
from dit_lens.explorer.explorer import Explorer, explore
from dit_lens.explorer.runs import explorer_reads
from dit_lens.explorer.setting import Setting
from dit_lens.explorer.steering import Steer, steer
from dit_lens.explorer.view_arrays import Views
from dit_lens.old_names import find_old_names

__all__ = ["Explorer", "Setting", "Steer", "Views", "atlas", "explore", "explorer_reads", "steer"]

__getattr__ = find_old_names(__name__, {"views": "explorer_reads"})
