"""What is uploaded names no place of the machine that it was made on, and holds no token."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dit_lens.core.runs.files import read_json, write_json
from dit_lens.errors import StoreError
from dit_lens.toys import WEIGHTS

SAID = ("prompt", "negative_prompt")  # a user's own words, which are never changed
SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/proc", "/sbin", "/sys", "/usr")  # as on every machine
HOMES = ("/home/", "/root/", "/Users/", "/mnt/", "/media/", "/scratch/", "/Volumes/", "/private/", "~/")  # of people
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]+snapshots[/\\]")  # as the Hub's client keeps repositories
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?(?:[/\\]{1,4}[\w.@+~-]+){2,}")
HEADER = 8  # bytes that say how long the header of a safetensors file is


def hide_places(value: Any) -> Any:
    """The same JSON, with the name alone in place of every absolute path, and without addresses of servers.

    >>> hide_places({"model": "/home/someone/models/flux", "prompt": ["/home/someone/models"]})
    {'model': 'flux', 'prompt': ['/home/someone/models']}
    """
    if isinstance(value, Mapping):
        kept = {key: one if key in SAID else hide_places(one) for key, one in value.items()}
        if isinstance(server := kept.get("server"), Mapping) and "host" in server:
            kept["server"] = None
        if str(kept.get("device", "")).startswith("nnsight server"):
            kept["device"] = "nnsight server"
        return kept
    if isinstance(value, list | tuple):
        return [hide_places(one) for one in value]
    return _name_of(value) if isinstance(value, str) and _is_place(value) else value


def hide_places_in(file: Path) -> None:
    """Does so in a JSON file."""
    write_json(file, hide_places(read_json(file, file.name)))


def hide_tokens(text: str, token: str | None) -> str:
    """A text without access tokens.

    >>> hide_tokens("401 for hf_abcdefghijkl and for my-own", "my-own")
    '401 for *** and for ***'
    """
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


def check_folder(folder: Path, token: str | None) -> None:
    """StoreError where a file that is to be uploaded names a place of this machine, or holds a token."""
    for file in sorted(folder.rglob("*")):
        for text in _list_texts(file):
            if (token and token in text) or TOKEN.search(text):
                raise StoreError(f"{file.name} would hold an access token, so nothing was uploaded. Take it out.")
            if (place := _find_place(text)) is not None:
                raise StoreError(
                    f"{file.name} names {place}, which is on this machine, so nothing was uploaded. Make it again from "
                    "what has a name of its own, such as a repository, or with the path taken out."
                )


def _list_texts(file: Path) -> Iterator[str]:
    """What a file says: all of a text, and the header of a safetensors file."""
    if file.suffix in (".json", ".md", ".html"):
        yield file.read_text("utf-8")
    elif file.suffix == ".safetensors":
        with file.open("rb") as stream:
            yield stream.read(int.from_bytes(stream.read(HEADER), "little")).decode("utf-8")


def _find_place(text: str) -> str | None:
    """A path of this machine in a text: under a home, the working or temporary folder, or one that exists."""
    own = [str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if place.parent != place]
    for found in dict.fromkeys(PATH.findall(text)):
        place = re.sub(r"\\+", r"\\", found)
        windows = PureWindowsPath(place).is_absolute() and not place.startswith("/")
        if windows or place.startswith((*HOMES, *(f"{one}/" for one in own))) or place in own:
            return found
        if not place.startswith(SYSTEM) and _exists(place):
            return found
    return None


def _exists(place: str) -> bool:
    try:
        return Path(place).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return False


def _is_place(text: str) -> bool:
    rooted = text.startswith("~/") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return rooted and len(re.split(r"[/\\]+", text.strip("/\\"))) > 1 and "\n" not in text


def _name_of(text: str) -> str:
    """The last part of a path; of a toy or a cached repository what it is loaded by."""
    if cached := CACHED.search(text):
        return "/".join(cached.groups())
    name = re.split(r"[/\\]+", text.rstrip("/\\"))[-1]
    return f"toy:{name}" if Path(text).parent == WEIGHTS else name
