"""Folders that are written whole or not at all, and data that is read with an error a person can use."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from dit_lens.errors import DitLensError, StoreError, show

if TYPE_CHECKING:
    from PIL.Image import Image

LOCK = ".dit_lens.lock"  # in the folder in which something is being replaced
PATIENCE = 60.0  # seconds to wait for another writer, who needs milliseconds
LARGEST_JSON = 2**30  # bytes


@contextmanager
def whole_folder(path: str | Path, *, mark: str, overwrite: bool = True) -> Generator[Path]:
    """Yields an empty folder beside ``path``; when the block succeeds it takes the place of ``path``.

    When the block raises (Ctrl-C included) ``path`` stays as it was. Several processes may write the same folder: each
    writes one of its own, and the last to finish stays.

    path: the folder to write.
    mark: a file that every folder of this kind has. An existing folder without it was not written by this library, and
        is never replaced, unless it is empty.
    overwrite: whether an existing folder of this kind may be replaced.
    """
    path = Path(path)
    with report_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(path.parent):
            _check_replaceable(path, mark, overwrite)
            _remove_leftovers(path)
        fresh = _name_beside(path, f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        fresh.mkdir()
        try:
            yield fresh
            (fresh / mark).touch()
            with _alone_in(path.parent):
                _check_replaceable(path, mark, overwrite)
                old = _name_beside(path, "old")
                shutil.rmtree(old, ignore_errors=True)
                if path.exists():
                    path.rename(old)
                fresh.rename(path)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def report_unwritten(path: str | Path) -> Generator[None]:
    """Turns what a full disk, a missing right or an impossible name or text causes inside into a StoreError.

    path: the file or folder that is written, whole or not at all.
    """
    from safetensors import SafetensorError

    try:
        yield
    except DitLensError:
        raise
    except (OSError, SafetensorError) as problem:
        why = getattr(problem, "strerror", None) or problem  # which names the file beside, and not what was asked
        raise StoreError(
            f"{show(str(path))} could not be written: {why}. What was there before is unchanged, and nothing is "
            "left half-written. Choose another place, or free some space."
        ) from problem
    except UnicodeEncodeError as problem:
        raise StoreError(
            f"{show(str(path))} could not be written: it would hold half of a character, "
            f"{problem.object[problem.start : problem.end]!r}, which is no text. What was there before is unchanged, "
            "and nothing is left half-written. Take it out of the names and texts that you gave."
        ) from problem


def check_place(path: str | Path, room: float = 0) -> None:
    """Raises StoreError where a file could not be written, so that nothing is computed in vain.

    path: the file, or what is to become a folder.
    room: bytes that must be free there.
    """
    path = Path(path)
    _name_beside(path, "partial")
    with report_unwritten(path):
        if path.is_dir():
            raise StoreError(
                f"{path} is a folder, and a file is to be written. Add a name, such as {path / 'page.html'}."
            )
        _check_room(path, room)


def check_folder(path: str | Path, mark: str, room: float = 0) -> None:
    """As :func:`check_place`, for what :func:`whole_folder` is to write."""
    path = Path(path)
    _name_beside(path, "partial")
    with report_unwritten(path):
        _check_replaceable(path, mark, overwrite=True)
        _check_room(path, room)


def _check_room(path: Path, room: float) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(
            f"{path} cannot be written: {parent} is no folder, or may not be written to. Choose another place."
        )
    if (free := shutil.disk_usage(parent).free) < room:
        raise StoreError(
            f"{path} needs about {room / 2**20:.0f} MiB, and {free / 2**20:.0f} are free there. Free some space, or "
            "choose another place."
        )


def _check_replaceable(path: Path, mark: str, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise StoreError(f"{path} is a file or a link, which is never replaced. Choose another name.")
    if not any(path.iterdir()):
        return
    if not (path / mark).is_file():
        raise StoreError(f"{path} holds other files (it has no {mark}), so it is not replaced. Choose another folder.")
    if not overwrite:
        raise StoreError(f"{path} exists already. Pass overwrite=True to replace it, or choose another folder.")


def _remove_leftovers(path: Path) -> None:
    """Removes what writers that were killed on this machine have left of ``path``."""
    start, end = f".{path.name}.{platform.node()}-", ".partial"
    for entry in path.parent.iterdir():
        if entry.name.startswith(start) and entry.name.endswith(end):
            writer = entry.name[len(start) :].partition("-")[0]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Generator[None]:
    """Keeps other writers of a folder waiting."""
    try:
        os.close(os.open(folder / LOCK, os.O_CREAT | os.O_RDWR))  # the lock would wait for ever where nobody may write
    except OSError as problem:
        raise StoreError(f"{folder} cannot be written to: {problem}. Choose another place.") from problem
    try:
        with FileLock(folder / LOCK, timeout=PATIENCE):
            yield
    except Timeout as waited:
        raise StoreError(f"another process has been writing in {folder} for {PATIENCE:.0f} s. Try again.") from waited


def check_pipeline(folder: Path) -> bool:
    """Whether a path is the folder of a diffusers pipeline; raises StoreError if it exists and is not one."""
    try:
        found, exists = (folder / "model_index.json").is_file(), folder.exists()
    except (OSError, ValueError) as problem:  # a name that no file can have
        raise StoreError(f"{show(str(folder))} cannot be read: {problem.__class__.__name__}.") from problem
    if found:
        return True
    if exists:
        raise StoreError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json. "
            "Name the folder that save_pretrained wrote."
        )
    return False


def find_folder(path: str | Path) -> Path:
    """The folder to read: ``path``, or what it replaced if the writer died between the two renames."""
    path = Path(path)
    try:
        if path.exists():
            return path
        old = _name_beside(path, "old")
        if not old.exists():
            return path
    except (OSError, ValueError) as problem:  # a name that no file can have
        raise StoreError(f"{str(path)[:200]!r} cannot be read: {problem.__class__.__name__}.") from problem
    with _alone_in(path.parent):  # a writer may be between the two
        return path if path.exists() else old


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON through a file beside it, so that readers never see half of it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Writes a file whole or not at all, folders included, and returns its path."""
    path = Path(path)
    with report_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _name_beside(path, f"{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def read_json(path: str | Path, what: str) -> Any:
    """Reads JSON; ``what`` names it in the error when it is missing or damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).stat().st_size <= LARGEST_JSON else None
        value = None if text is None else json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{path} does not exist, so {what} cannot be read from there. Check the folder's name."
        ) from None
    except (OSError, ValueError, RecursionError) as damage:
        raise StoreError(
            f"{str(path)[:200]} is not readable as {what}: {damage}. Restore the folder or make it again."
        ) from damage
    if text is None:
        raise StoreError(f"{path} is larger than {LARGEST_JSON // 2**20} MiB, so it is not read as {what}.")
    return value


def read_versioned(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Reads the JSON of a folder that this library wrote, and refuses another format. kind: "run" or "result"."""
    data = read_json(path, f"a saved {kind}")
    if not isinstance(data, dict) or data.get("format") != version:
        raise StoreError(
            f"{path.parent} holds no {kind} of format {version}. Was it written by another version of dit_lens?"
        )
    return data


@contextmanager
def report_damage(folder: Path, remedy: str) -> Generator[None]:
    """Turns whatever damaged or foreign data causes inside into a StoreError. remedy: what to do, as a sentence."""
    from PIL import Image, UnidentifiedImageError
    from safetensors import SafetensorError

    try:
        yield
    except StoreError:
        raise
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
        MemoryError,
        SafetensorError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as damage:
        raise StoreError(f"{folder} is incomplete or damaged: {damage}. {remedy}") from damage


def file_inside(folder: Path, name: Any) -> Path:
    """A file of a folder by its stored name; StoreError if the name or a link leads elsewhere."""
    inside = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
    if not inside or (folder / name).resolve().parent != folder.resolve():
        raise StoreError(f"{folder} names a file {show(name)} outside itself, which is not read.")
    return folder / name


def read_image(folder: Path, name: Any) -> Image:
    """An image of a folder by its stored name; a StoreError comes from ``report_damage``, bombs of pixels included."""
    from PIL import Image

    file = file_inside(folder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=["PNG"]).copy()


def _name_beside(path: Path, mark: str) -> Path:
    if path.name in ("", ".."):
        raise StoreError(f"{show(str(path))} has no name of its own that could be written. Give a name.")
    return path.with_name(f".{path.name}.{mark}")
