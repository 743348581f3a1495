"""These tests need a whole NDIF server, which ``python -m tests.ndif FOLDER`` brings up around them."""

import os

collect_ignore_glob = ["on_server/*"] if "DIT_LENS_NDIF" in os.environ else ["*"]
