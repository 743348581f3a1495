"""Folders that are written whole or not at all, and data that is read with an error a person can use."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
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
def whole_folder(path: str | Path, *, mark: str, own: str, overwrite: bool = True) -> Generator[Path]:
    """Yields an empty folder beside ``path``; when the block succeeds it takes the place of ``path``.

    When the block raises (Ctrl-C included) ``path`` stays as it was. Several processes may write the same folder: each
    writes one of its own, and the last to finish stays. What else lies in ``path``, such as a user's notes, stays
    there.

    path: the folder to write.
    mark: a file that every folder of this kind has. An existing folder without it was not written by this library, and
        is never replaced, unless it is empty.
    own: a regular expression for the files of this kind of folder, by their path inside it; no others are ever removed.
    overwrite: whether an existing folder of this kind may be replaced.
    """
    path = Path(path)
    with report_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent):
            _put_back(path)
            _check_replaceable(path, mark, overwrite)
            _remove_leftovers(path)
        fresh = _name_beside(path, f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        fresh.mkdir()
        try:
            yield fresh
            (fresh / mark).touch()
            with alone_in(path.parent):
                old = _put_back(path)
                _check_replaceable(path, mark, overwrite)
                shutil.rmtree(old, ignore_errors=True)
                if path.exists():
                    _keep_others(path, fresh, own)
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


def check_folder(path: str | Path, mark: str, room: float = 0, *, overwrite: bool = True) -> None:
    """As :func:`check_place`, for what :func:`whole_folder` is to write with the same ``mark`` and ``overwrite``."""
    path = Path(path)
    _name_beside(path, "partial")
    with report_unwritten(path):
        _check_replaceable(path, mark, overwrite)
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


def _put_back(path: Path) -> Path:
    """Where a writer puts what it replaces; if one died before ``path`` was there again, that is put back."""
    old = _name_beside(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    return old


def _keep_others(path: Path, fresh: Path, own: str) -> None:
    """Gives a folder that takes the place of another all that the other has and this library did not write there.

    A file is in both folders for a moment, so that it is never in none.
    """

    def fail(problem: OSError) -> None:
        raise problem

    for folder, folders, files in os.walk(path, onerror=fail):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in [*files, *links]:
            file = Path(folder, name)
            inside = file.relative_to(path)
            if name != LOCK and not re.fullmatch(own, inside.as_posix()):
                (fresh / inside).parent.mkdir(parents=True, exist_ok=True)
                _duplicate(file, fresh / inside)
        if not files and not folders:
            (fresh / Path(folder).relative_to(path)).mkdir(parents=True, exist_ok=True)


def _duplicate(file: Path, to: Path) -> None:
    """The same file under another name: a hard link, or a copy where the disk has none."""
    try:
        os.link(file, to, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(file, to, follow_symlinks=False)


def _remove_leftovers(path: Path) -> None:
    """Removes what writers that were killed on this machine have left of ``path``."""
    start, end = f".{path.name}.{platform.node()}-", ".partial"
    for entry in path.parent.iterdir():
        if entry.name.startswith(start) and entry.name.endswith(end):
            writer = entry.name[len(start) :].partition("-")[0]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Keeps other processes that write in a folder waiting; the folder must be there."""
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
        _check_files(folder)
        return True
    if exists:
        raise StoreError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json. "
            "Name the folder that save_pretrained wrote."
        )
    return False


def _check_files(folder: Path) -> None:
    """Raises StoreError where a folder holds a pipe, socket or device, which whoever loads it would read for ever."""
    for place, _, files in os.walk(folder):
        for name in files:
            check_regular(Path(place, name))


def check_regular(path: Path) -> Path:
    """A path as it was given; StoreError where something other than a file is there: a pipe or device has no end.

    What is not there at all is for those to tell who know what it is.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise StoreError(f"{path} is a {kind}, not a file, so it is not read. Restore the folder or make it again.")
    return path


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
    with alone_in(path.parent):  # a writer may be between the two
        return path if path.exists() else old


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON through a file beside it, so that readers never see half of it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Writes a file whole or not at all, folders included, and returns its path."""
    with report_unwritten(path):
        return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """As :func:`write_text`, what is no text."""
    path = Path(path)
    with report_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _name_beside(path, f"{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        try:
            fresh.write_bytes(content)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


CHECK = "Check the folder's name."


def read_json(path: str | Path, what: str, remedy: str | None = None) -> Any:
    """Reads JSON.

    what: names it in the error when it is missing or damaged.
    remedy: what to do then, as a sentence; what can be said of any folder by default.
    """
    try:
        file = check_regular(Path(path))
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= LARGEST_JSON else None
        value = None if text is None else json.loads(text)
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} does not exist, so {what} cannot be read from there. {remedy or CHECK}") from None
    except (OSError, ValueError, RecursionError) as damage:
        raise StoreError(
            f"{str(path)[:200]} is not readable as {what}: {damage}. {remedy or 'Restore the folder or make it again.'}"
        ) from damage
    if text is None:
        too_large = f"{path} is larger than {LARGEST_JSON // 2**20} MiB, so it is not read as {what}."
        raise StoreError(f"{too_large} {remedy}" if remedy else too_large)
    return value


def read_versioned(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Reads the JSON of a folder that this library wrote, and refuses another format. kind: "run" or "result"."""
    data = read_json(file_inside(path.parent, path.name), f"a saved {kind}")
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


def file_inside(folder: Path, name: Any, *, under: str = "") -> Path:
    """A file of a folder by its stored name; StoreError if the name or a link leads elsewhere, or to no file.

    under: the part of the folder that it is in, such as "images".
    """
    inside = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
    if not inside or (folder / under / name).resolve() != folder.resolve() / under / name:
        raise StoreError(f"{folder} names a file {show(name)} outside itself, which is not read.")
    return check_regular(folder / under / name)


def read_image(folder: Path, name: Any, *, under: str = "") -> Image:
    """An image of a folder by its stored name; a StoreError comes from ``report_damage``, bombs of pixels included.

    under: as in :func:`file_inside`.
    """
    from PIL import Image

    file = file_inside(folder, name, under=under)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=["PNG"]).copy()


def _name_beside(path: Path, mark: str) -> Path:
    if path.name in ("", ".."):
        raise StoreError(f"{show(str(path))} has no name of its own that could be written. Give a name.")
    return path.with_name(f".{path.name}.{mark}")
