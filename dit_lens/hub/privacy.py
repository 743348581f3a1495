"""What is uploaded names no place of the machine that it was made on, and holds no token."""

from __future__ import annotations

import ipaddress
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from dit_lens.core.runs.files import read_json, write_json
from dit_lens.errors import StoreError
from dit_lens.toys import WEIGHTS

SAID = ("prompt", "negative_prompt")  # a user's own words, which are never changed
SYSTEM = ("bin", "dev", "etc", "lib", "proc", "sbin", "sys", "usr")  # folders that every machine has
HOMES = ("home", "root", "Users", "mnt", "media", "scratch", "Volumes", "private")  # folders of people
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]+snapshots[/\\]")  # as the Hub's client keeps repositories
TOKENS = (  # as services write them
    r"hf_[A-Za-z0-9]{8,}",
    r"api_org_[A-Za-z0-9]{16,}",
    r"gh[oprsu]_[A-Za-z0-9]{16,}",
    r"github_pat_\w{16,}",
    r"glpat-[\w-]{16,}",
    r"sk-(?:\w{2,8}-){0,2}\w{20,}",  # OpenAI, Anthropic
    r"xox[abeoprs]-[\w-]{10,}",  # Slack
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![\w+/])",  # AWS
    r"AIza[\w-]{35}(?![\w+/=-])",  # Google
    r"(?:npm_|pypi-|nvapi-|gsk_|r8_)[\w-]{30,}",
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",  # a JSON web token
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
)
TOKEN = re.compile(rf"(?<![A-Za-z0-9+/])(?:{'|'.join(TOKENS)})")
WEB = re.compile(r"(?:git\+)?https?://[^\s\"'`<>|,;?)\]}\\]+|hf://[\w./@-]+")  # what everybody can reach
SERVER = re.compile(r"(?<![\w+.-])[A-Za-z][\w+.-]*://[\w@~./-][^\s\"'`<>|]*")  # with any other scheme
ADDRESS = re.compile(r"(?<![\w.])((?:\d{1,3}\.){3}\d{1,3})(:\d+)?(?!\w|\.\d)")
PATH = re.compile(r"(?<![\w.~$%*)\]}+-])(?:~[A-Za-z_][\w-]+|~|[A-Za-z]:)?(?:[/\\]{1,4}[\w.@+~-]+)+")
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
            if (place := _find_place(text, is_page=file.suffix == ".html")) is not None:
                raise StoreError(
                    f"{file.name} names {place}, which is on this machine or in its network, so nothing was uploaded. "
                    "Make it again from what has a name of its own, such as a repository, or take it out."
                )


def _list_texts(file: Path) -> Iterator[str]:
    """What a file says: all of a text, and the strings of JSON and of the header of a safetensors file."""
    if file.suffix in (".md", ".html"):
        yield file.read_text("utf-8")
    elif file.suffix == ".json":
        yield from _list_strings(json.loads(file.read_text("utf-8")))
    elif file.suffix == ".safetensors":
        with file.open("rb") as stream:
            yield from _list_strings(json.loads(stream.read(int.from_bytes(stream.read(HEADER), "little"))))


def _list_strings(value: Any) -> Iterator[str]:
    """Every string of JSON, names of entries included, and those of JSON that a string is."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            yield from _list_strings(one)
    elif isinstance(value, str):
        yield value
        if value.startswith(("{", "[")):
            try:
                inner = json.loads(value)
            except ValueError:  # it only begins like JSON
                return
            yield from _list_strings(inner)


def _find_place(text: str, *, is_page: bool) -> str | None:
    """What a text names of this machine or its network: a path, or the address of a server.

    is_page: whether it is the code of a page, which is full of strokes and backslashes: there, a path is what is under
        the folder of a person or the working or temporary folder, or exists.
    """
    for found in WEB.findall(text):
        if not found.startswith("hf:") and not _is_public(found):
            return found
    text = WEB.sub(" ", text)
    for found in SERVER.findall(text):
        if not is_page or re.match(r"file:|.*@|.*:\d", found):
            return found
    for found in ADDRESS.finditer(text):
        if _is_server(found.group(1), has_port=bool(found.group(2)), is_page=is_page):
            return found.group()
    return next((found for found in dict.fromkeys(PATH.findall(text)) if _is_own(found, is_page=is_page)), None)


def _is_public(address: str) -> bool:
    """Whether an address of the web is one of a host that has a name, and holds no password."""
    try:
        found = urlsplit(address)
        host = found.hostname or ""
    except ValueError:
        return False
    return "@" not in found.netloc and re.fullmatch(r"[\w-]+(\.[\w-]+)*\.[A-Za-z][\w-]*", host) is not None


def _is_server(number: str, *, has_port: bool, is_page: bool) -> bool:
    """Whether four numbers are the address of a server, and not a version or, in a page, part of a drawing."""
    try:
        return has_port or (ipaddress.ip_address(number).is_private and not is_page)
    except ValueError:
        return False


def _is_own(found: str, *, is_page: bool) -> bool:
    """Whether what looks like a path is one of this machine. is_page: as of :func:`_find_place`."""
    place = re.sub(r"[/\\]+", "/", found)
    first, *rest = place.strip("/").split("/")
    if not rest:
        return False
    own = [str(folder) for folder in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if folder.parent != folder]
    if first in HOMES or place in own or place.startswith(tuple(f"{folder}/" for folder in own)):
        return True
    if not found.startswith(("/", "\\")):  # of a drive or a person
        return len(rest) > 1 or not is_page
    if found.startswith("\\"):  # a server's, and not a command of LaTeX
        return found.startswith("\\" * (4 if is_page else 2))
    return first not in SYSTEM and (not is_page or _exists(place))


def _exists(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # a name that no file can have
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
