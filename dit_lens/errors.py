"""Exceptions, and the wording of their messages: what was asked for, what exists, the closest match, the next step."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any


class DitLensError(Exception):
    """The base class of every error that this library raises on purpose."""


class SiteError(DitLensError, KeyError):
    """A site, stream, point or block that the model does not have.

    A KeyError, so that mappings from sites to values behave as Python's mappings do: ``in`` and ``.get`` do not raise.
    """

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, in which a message would stand in quotation marks.
        return Exception.__str__(self)


class CallError(DitLensError, TypeError):
    """A call with an argument that a function does not have, or without one that it needs."""


class OpError(DitLensError, ValueError):
    """An operation that cannot be carried out: channels, tokens, steps, rows, shapes or sources that do not fit."""


class PromptError(DitLensError, ValueError):
    """A prompt, seed or pipeline argument that cannot be used."""


class FamilyError(DitLensError, TypeError):
    """A pipeline that no family describes, or whose loaded modules differ from what its family says."""


class ExecutionError(DitLensError, RuntimeError):
    """A run that did not go as planned: an op that never fired, or forward passes that do not match the plan."""


class StoreError(DitLensError, OSError):
    """A folder that is missing, incomplete, damaged or in another format."""


class NotYetError(DitLensError, RuntimeError):
    """A value that was asked for before the run that produces it."""


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study.

    study: name of the study.
    done: number of finished cells.
    total: number of cells in the whole study.
    folder: folder that keeps the finished cells, or None if the study was called without ``out=``.
    result: ``Result`` of the finished cells, or None before the first one.
    """

    def __init__(self, study: str, done: int, total: int, folder: Path | None, result: Any):
        kept = (
            f"it continues from {folder} when it is called again with the same arguments"
            if folder
            else "their result is sys.last_value.result in a notebook; pass out=FOLDER to make a study continuable"
        )
        super().__init__(f"{study} was interrupted after {done} of {total} cells; {kept}.")
        self.folder, self.result = folder, result


def warn(text: str) -> None:
    """Warns at the line outside this library that led here, however many calls lie between."""
    frame, level = sys._getframe(1), 2  # noqa: SLF001 as in warnings itself
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("dit_lens."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def check_choice(value: object, known: Collection[str], name: str) -> None:
    """Raises OpError if a value is not one of the known ones. name: what the value is called, such as "arm"."""
    if not isinstance(value, str) or value not in known:
        raise OpError(f"{show(value)} is not a valid {name}.{nearest(value, known)}")


def show(value: Any) -> str:
    """A value as a message shows it: short, and without failing where its own repr does."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape):
        return f"{type(value).__name__} of shape {list(shape)}"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 the message is about the value, whatever its repr does
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(asked: object, known: Iterable[str], what: str = "There are") -> str:
    """Returns the end of an error message: the closest known name, then all of them.

    >>> nearest("blu", ["red", "blue"])
    " Nearest: 'blue'. There are: red, blue."
    """
    known = [str(name) for name in known]
    if isinstance(asked, str) and re.match(r"blocks\.-\d", asked):  # the nearest name would be of another block
        return f" In a name, blocks are counted from 0. {what}: {', '.join(known)}."
    close = difflib.get_close_matches(asked if isinstance(asked, str) else show(asked), known, n=1, cutoff=0.5)
    return (f" Nearest: {close[0]!r}." if close else "") + f" {what}: {', '.join(known)}."
