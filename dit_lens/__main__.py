"""``python -m dit_lens`` is ``dit-lens``, for where scripts are not on the path."""

import sys

from dit_lens.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
