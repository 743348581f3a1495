"""The table of families. A new DiT is a new row here, or one given to ``dit_lens.register_family``."""

from dit_lens.families.table.cross import CROSS
from dit_lens.families.table.dual import DUAL
from dit_lens.families.table.flux import FLUX
from dit_lens.families.table.joint import JOINT
from dit_lens.families.table.video import VIDEO

TABLE = (*FLUX, *DUAL, *JOINT, *CROSS, *VIDEO)
