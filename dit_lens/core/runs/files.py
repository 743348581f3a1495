"""Folders that are written whole or not at all, and JSON that is read with an error a person can use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_lens.errors import StoreError


@contextmanager
def whole_folder(path: str | Path, *, overwrite: bool = True) -> Generator[Path]:
    """Yields an empty folder beside ``path``; when the block succeeds it takes the place of ``path``.

    When the block raises (Ctrl-C included) ``path`` stays as it was.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already. Pass overwrite=True to replace it, or choose another folder.")
    fresh, old = _beside(path, "partial"), _beside(path, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_pipeline(folder: Path) -> bool:
    """Whether a path is the folder of a diffusers pipeline; raises StoreError if it exists and is not one."""
    if (folder / "model_index.json").is_file():
        return True
    if folder.exists():
        raise StoreError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json. "
            "Name the folder that save_pretrained wrote."
        )
    return False


def recovered(path: str | Path) -> Path:
    """The folder to read: ``path``, or what it replaced if the writer died between the two renames."""
    path = Path(path)
    return _beside(path, "old") if not path.exists() and _beside(path, "old").exists() else path


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON through a file beside it, so that readers never see half of it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Writes a file whole or not at all, and returns its path."""
    path = Path(path)
    fresh = _beside(path, "partial")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def read_json(path: str | Path, what: str) -> Any:
    """Reads JSON; ``what`` names it in the error when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{path} does not exist, so {what} cannot be read from there. Check the folder's name."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as damage:
        raise StoreError(
            f"{path} is not readable as {what}: {damage}. Restore the folder or make it again."
        ) from damage


def read_versioned(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Reads the JSON of a folder that this library wrote, and refuses another format. kind: "run" or "result"."""
    data = read_json(path, f"a saved {kind}")
    if not isinstance(data, dict) or data.get("format") != version:
        raise StoreError(
            f"{path.parent} holds no {kind} of format {version}. Was it written by another version of dit_lens?"
        )
    return data


def _beside(path: Path, mark: str) -> Path:
    return path.with_name(f".{path.name}.{mark}")
