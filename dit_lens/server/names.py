"""Under which names a server's pipeline may be asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

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

    def why_not(self, key: str) -> str:
        """What keeps this server from serving a key; empty if nothing does.

        Repositories have one name everywhere. A folder lies elsewhere on the client's machine: its last part counts.
        """
        kind, _, rest = key.partition(":")
        try:
            asked = json.loads(rest)
            name, revision = str(asked["repo_id"]), asked.get("revision")
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"it asks for {key[:200]!r}, which names no pipeline. This server serves {self.name}"
        if kind != CLASS:
            return f"it asks for a model of class {kind[:200]}, and this server serves {CLASS}"
        either = self.local or _is_path(name)
        same = _last(name) == _last(self.name) if either else name.lower() == self.name.lower()
        if not same:
            advice = f"DiTLens.remote({self.name!r}, host=...)"
            if self.local:
                advice = f"a folder named {_last(self.name)!r}, or a repository of that name"
            return f"it asks for {name}, and this server serves {self.name}. Ask for {advice}"
        if revision is not None and self.revision is not None and revision != self.revision:
            return f"it asks for revision {revision}, and this server serves {self.revision} of {self.name}"
        return ""


def _is_path(name: str) -> bool:
    """Whether a name is a folder's: repositories are called owner/name."""
    return PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith(".")


def _last(name: str) -> str:
    return PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name
