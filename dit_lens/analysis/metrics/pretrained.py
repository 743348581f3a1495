"""Models of transformers that judge images: loaded from a folder or repository, with an error a person can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_lens.arguments.paths import expand_user
from dit_lens.errors import StoreError


def load_pretrained(path: str | Path, what: str, *kinds: Any, **options: Any) -> list[Any]:
    """One object of every kind, such as a model and its processor, from one folder or repository.

    path: the folder or repository.
    what: what is loaded, in words.
    kinds: classes with ``from_pretrained``.
    options: for each of them.
    Raises StoreError if one cannot be loaded, or needs a package that is not installed.
    """
    import transformers

    path = expand_user(path)
    try:
        return [kind.from_pretrained(path, **options) for kind in kinds]
    except (OSError, ValueError, ImportError) as problem:
        raise StoreError(f"{path} could not be loaded as {what}: {problem}") from problem
    except (AttributeError, RuntimeError, TypeError, LookupError) as problem:
        raise StoreError(
            f"{path} could not be loaded as {what}: {type(problem).__name__}: {problem}. Code that comes with weights "
            f"is of one release of transformers, and this is {transformers.__version__}: take its newest revision."
        ) from problem
