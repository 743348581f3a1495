"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_user(path: str | os.PathLike[str]) -> str | Path:
    """A path whose ``~`` is the home folder, as shells have it; any other path as it is.

    >>> expand_user("~/run") == str(Path.home() / "run"), expand_user("runs/~")
    (True, 'runs/~')
    """
    text = os.path.expanduser(path)  # noqa: PTH111 pathlib fails where a name after ~ is no user
    return text if isinstance(path, str) else Path(text)
