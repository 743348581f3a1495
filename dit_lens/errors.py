"""What users are told. Every message says what was asked, what exists, the nearest match and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_lens.studies.shared.result import Result


class DitLensError(Exception):
    """The base of every error this library raises on purpose."""


class SiteError(DitLensError, LookupError):
    """A site, stream, point or block that the model does not have."""


class OpError(DitLensError, ValueError):
    """An operation that cannot be carried out: channels, tokens, steps, rows, shapes or sources that do not fit."""


class PromptError(DitLensError, ValueError):
    """A prompt, seed or pipeline argument that cannot be used."""


class FamilyError(DitLensError, TypeError):
    """A pipeline that no family describes, or whose live structure differs from what its family says."""


class ExecutionError(DitLensError, RuntimeError):
    """A run that did not go as planned: an op that never fired, or transformer calls that do not match the plan."""


class StoreError(DitLensError, OSError):
    """A folder that is missing, incomplete, damaged or of another format."""


class NotYetError(DitLensError, RuntimeError):
    """A value that was asked for before the run that produces it."""


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study. What was finished is in ``result`` (None before the first cell), and in ``folder`` if any."""

    def __init__(self, study: str, done: int, total: int, folder: Path | None, result: Result | None):
        kept = (
            f"it goes on from {folder} when it is called again with the same arguments"
            if folder
            else "their result is sys.last_value.result in a notebook; pass out=FOLDER for a study that can go on"
        )
        super().__init__(f"{study} was interrupted after {done} of {total} cells; {kept}.")
        self.folder, self.result = folder, result


def nearest(asked: str, known: Iterable[str], what: str = "There are") -> str:
    """The closing words of an error: the closest known name, then all of them.

    >>> nearest("blu", ["red", "blue"])
    " Nearest: 'blue'. There are: red, blue."
    """
    known = [str(name) for name in known]
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    return (f" Nearest: {close[0]!r}." if close else "") + f" {what}: {', '.join(known)}."
