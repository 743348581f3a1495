"""Under which names a server's pipeline may be asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

TOYS = ("dit_lens", "toys", "weights")  # where the toys of this library are
CLASS = "nnsight.modeling.diffusion.DiffusionModel"


@dataclass(frozen=True)
class Served:
    """The pipeline of a server.

    name: its folder or repository.
    revision: of the repository, if one was asked for.
    local: whether it is a folder.
    describes: lines for its page.
    """

    name: str
    revision: str | None
    local: bool
    describes: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """As nnsight's client writes it."""
        return f"{CLASS}:{json.dumps({'repo_id': self.name, 'revision': self.revision})}"

    @property
    def label(self) -> str:
        """The name under which a person asks for it: a toy has one everywhere."""
        return _label(self.name)

    def why_not(self, key: str) -> str:
        """What keeps this server from serving a key; empty if nothing does.

        Repositories have one name everywhere. A folder lies elsewhere on the client's machine: its last part counts.
        """
        kind, _, rest = key.partition(":")
        try:
            asked = json.loads(rest)
            name, revision = str(asked["repo_id"]), asked.get("revision")
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"it asks for {key[:200]!r}, which names no pipeline. This server serves {self.label}"
        if kind != CLASS:
            return f"it asks for a model of class {kind[:200]}, and this server serves {CLASS}"
        either = self.local or _is_path(name)
        same = _last(name) == _last(self.name) if either else name.lower() == self.name.lower()
        if not same:
            advice = f"DiTLens.remote({self.label!r}, host=...)"
            if self.local and self.label == self.name:
                advice = f"a folder named {_last(self.name)!r}, or a repository of that name"
            return f"it asks for {_label(name)}, and this server serves {self.label}. Ask for {advice}"
        if revision is not None and self.revision is not None and revision != self.revision:
            return f"it asks for revision {revision}, and this server serves {self.revision} of {self.name}"
        return ""


def _label(name: str) -> str:
    """A name as a person writes it: "toy:flux" for the folder of a toy, which is elsewhere on every machine."""
    *place, last = (PureWindowsPath(name) if "\\" in name else PurePosixPath(name)).parts or ("",)
    return f"toy:{last}" if tuple(place[-len(TOYS) :]) == TOYS else name


def _is_path(name: str) -> bool:
    """Whether a name is a folder's: repositories are called owner/name."""
    return PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith(".")


def _last(name: str) -> str:
    return PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name
