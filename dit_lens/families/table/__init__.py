"""The rows of all families, one file for each kind of block: import TABLE, the tuple of all rows, from here."""

from dit_lens.families.table.cogview import COGVIEW
from dit_lens.families.table.cross import CROSS
from dit_lens.families.table.dual import DUAL
from dit_lens.families.table.flux import FLUX
from dit_lens.families.table.hunyuan import HUNYUAN
from dit_lens.families.table.joint import JOINT
from dit_lens.families.table.next_dit import NEXT_DIT
from dit_lens.families.table.video import VIDEO

TABLE = (*FLUX, *DUAL, *COGVIEW, *HUNYUAN, *NEXT_DIT, *JOINT, *CROSS, *VIDEO)
