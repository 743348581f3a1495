"""Uploads to the Hugging Face Hub, and what is downloaded from there."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_lens.analysis.channels import ChannelSet
from dit_lens.arguments.checks import checked
from dit_lens.core.request.dictionaries import Dictionary
from dit_lens.core.request.dictionaries import load as load_dictionary
from dit_lens.core.runs.files import check_regular, read_json, report_damage, write_json, write_text
from dit_lens.core.runs.run import Run
from dit_lens.errors import DitLensError, OpError, StoreError, show
from dit_lens.hub import cards
from dit_lens.hub.privacy import check_folder, hide_places, hide_places_in, hide_tokens
from dit_lens.instruments.steering_vectors import Steering
from dit_lens.studies import Result

WHERE = "https://huggingface.co"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST = 400  # characters of what the Hub says
ONLINE = "Check its name, that you are logged in (hf auth login) and may do so, and that the network is up."
OFFLINE = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so the Hub is not asked. Unset it and start Python again."
KEPT = ["*.json", "*.safetensors", "images/*.png"]  # what is downloaded


@dataclass(frozen=True)
class Kind:
    """What can be shared.

    cls: its class.
    name: the variable in the line of the card that loads it.
    file: that tells what a repository holds.
    what: in a sentence, for the card.
    write: writes it into a folder.
    load: reads it from one.
    describe: how it was made.
    """

    cls: type
    name: str
    file: str
    what: str
    write: Callable[[Any, Path], Any]
    load: Callable[[Path], Any]
    describe: Callable[[Any], dict[str, Any]]


def _load_channels(folder: Path) -> ChannelSet:
    with report_damage(folder, "Push it again."):
        return ChannelSet.from_json(read_json(folder / "channels.json", "channels"))


def _save_folder(thing: Run | Result, folder: Path) -> None:
    """A run stays where it was saved: what is uploaded is another copy."""
    saved = thing.folder if isinstance(thing, Run) else None
    thing.save(folder, overwrite=True)
    if isinstance(thing, Run):
        thing.folder = saved


def _save_dictionary(dictionary: Dictionary, folder: Path) -> None:
    saved = dictionary.file
    dictionary.save(folder / "dictionary.safetensors")
    dictionary.stored_in(saved)


KINDS = (
    Kind(
        Run,
        "run",
        "run.json",
        "A run of a diffusion transformer: its images, what was read and changed on the way, and all that it takes to "
        "draw it again (`lens.rerun(run)`).",
        _save_folder,
        Run.load,
        cards.describe_run,
    ),
    Kind(
        Result,
        "result",
        "result.json",
        "The result of a study of a diffusion transformer, with its controls, intervals and images: `result.table`, "
        "`result.summary`, `result.figure()`.",
        _save_folder,
        Result.load,
        cards.describe_result,
    ),
    Kind(
        Steering,
        "steering",
        "steering.safetensors",
        "Directions that steer a diffusion transformer: `lens.run(prompt, steering.op(1.0))` adds them.",
        lambda steering, folder: steering.save(folder / "steering.safetensors"),
        lambda folder: Steering.load(folder / "steering.safetensors"),
        cards.describe_steering,
    ),
    Kind(
        ChannelSet,
        "channels",
        "channels.json",
        "Channels of a diffusion transformer, for `channels=` of any op, with the scores that chose them.",
        lambda channels, folder: write_json(folder / "channels.json", channels.to_json()),
        _load_channels,
        cards.describe_channels,
    ),
    Kind(
        Dictionary,
        "dictionary",
        "dictionary.safetensors",
        "Features of a diffusion transformer, for `Feature` and `ReadFeatures`.",
        _save_dictionary,
        lambda folder: load_dictionary(folder / "dictionary.safetensors"),
        cards.describe_dictionary,
    ),
)


@checked
def push_to_hub(
    thing: Any,
    repo_id: str,
    *,
    facts: Mapping[str, Any] | None = None,
    note: str = "",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads a run, result, channel set, directions or dictionary to the Hugging Face Hub; returns its address.

    >>> import torch
    >>> from dit_lens import Steering
    >>> push_to_hub(Steering({"blocks.3.img": torch.ones(128)}), "me/blue")  # doctest: +SKIP
    'https://huggingface.co/me/blue'

    A card (README.md) is written with it: what it is, how it was made, and how to load it:
    ``dit_lens.from_hub(repo_id)``. An HTML file, such as :func:`dit_lens.atlas` writes, becomes a static Space, which
    shows it to anybody with a browser. What an earlier push left there stays in the history of the repository.

    Paths of this machine are not uploaded: of a model that was loaded from a folder its name is kept, and so it is of
    files that ops refer to. Where one remains, such as in a note, or the address of a server, nothing is
    uploaded, and the error names it. Nor is anything with an access token.

    thing: what to share, or the path of an HTML file.
    repo_id: "owner/name"; a repository that is not there yet is made.
    facts: further lines of the card's table, such as the model and revision that channels were found in.
    note: further text of the card.
    private: whether only its owner can see it; a public one by default. A repository that is there stays as it is.
    token: of the Hub; the one you logged in with by default (``hf auth login``). It goes nowhere else.

    Raises OpError for what cannot be shared, and StoreError where the Hub refuses or cannot be reached.
    """
    _check_name(repo_id)
    with tempfile.TemporaryDirectory() as place:
        folder, is_page = Path(place), isinstance(thing, str | Path)
        told = {str(name): value for name, value in (facts or {}).items()}
        if is_page:
            _write_page(Path(thing), repo_id, folder, told, note)
        else:
            _write_thing(thing, repo_id, folder, told, note)
        check_folder(folder, _find_token(token))
        where: dict[str, str] = {"repo_id": repo_id, "repo_type": "space" if is_page else "model"}
        with _reach(repo_id, "pushed", token) as api:
            api.create_repo(**where, private=private, exist_ok=True, space_sdk="static" if is_page else None)
            api.upload_folder(
                **where,
                folder_path=folder,
                commit_message=f"A {'page' if is_page else type(thing).__name__} of dit_lens",
                delete_patterns=["images/*"],
            )
    return f"{WHERE}/spaces/{repo_id}" if is_page else f"{WHERE}/{repo_id}"


@checked
def from_hub(
    repo_id: str, *, revision: str | None = None, folder: str | Path | None = None, token: str | None = None
) -> Any:
    """Downloads what :func:`push_to_hub` shared: a run, result, channel set, directions or a dictionary.

    >>> blue = from_hub("me/blue")  # doctest: +SKIP

    Only JSON, safetensors and PNG files are downloaded and read, which run no code.

    repo_id: "owner/name".
    revision: a branch, tag or commit; what was pushed last by default.
    folder: a new or empty folder that keeps the files; by default nothing is kept. Ops that use a run or dictionary
        have a JSON form only where it is in a file.
    token: of the Hub, for what is private; the one you logged in with by default.

    Raises StoreError where there is no such repository, or nothing in it that this library wrote.
    """
    _check_name(repo_id)
    keeps = None if folder is None else Path(folder)
    if keeps is not None and keeps.exists() and (not keeps.is_dir() or any(keeps.iterdir())):
        raise StoreError(f"{keeps} is not an empty folder. Choose another one, or leave folder= out.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:  # Windows keeps files that tensors are of
        there = Path(place) / "download" if keeps is None else keeps
        with _reach(repo_id, "downloaded", token) as api:
            api.snapshot_download(repo_id, revision=revision, local_dir=there, allow_patterns=KEPT)
        kind = next((one for one in KINDS if (there / one.file).is_file()), None)
        if kind is None:
            raise StoreError(
                f"{repo_id} holds nothing that push_to_hub wrote: {', '.join(one.file for one in KINDS)}. Check its "
                f"name; a page is looked at in a browser: {WHERE}/spaces/{repo_id}."
            )
        found = kind.load(there)
        if keeps is None and isinstance(found, Run):
            found.folder = None
        if keeps is None and isinstance(found, Dictionary):
            found.stored_in(None)
        return found


def _write_thing(thing: Any, repo_id: str, folder: Path, facts: Mapping[str, Any], note: str) -> None:
    """What is uploaded of something that can be loaded again."""
    kind = next((one for one in KINDS if isinstance(thing, one.cls)), None)
    if kind is None:
        names = ", ".join(one.cls.__name__ for one in KINDS)
        raise OpError(f"{show(thing)} cannot be shared. Give one of {names}, or the path of an HTML file.")
    kind.write(thing, folder)
    for file in folder.glob("*.json"):
        hide_places_in(file)
    told = {**kind.describe(thing), **hide_places(facts)}
    write_text(folder / "README.md", cards.write_card(repo_id, kind.what, kind.name, told, note))


def _write_page(page: Path, repo_id: str, folder: Path, facts: Mapping[str, Any], note: str) -> None:
    """What is uploaded of a page: a static Space."""
    if page.suffix != ".html" or not page.exists():
        raise StoreError(f"{page} is not an HTML file. Make one, such as dit_lens.atlas(lens, 'atlas.html', prompts).")
    shutil.copyfile(check_regular(page), folder / "index.html")
    head = {"title": repo_id.rsplit("/", maxsplit=1)[-1], "sdk": "static", "app_file": "index.html"}
    what = "Runs of a diffusion transformer to look into, without weights and without a kernel."
    write_text(folder / "README.md", cards.write_card(repo_id, what, "", hide_places(facts), note, head))


def _check_name(repo_id: str) -> None:
    if not NAME.fullmatch(repo_id):
        raise StoreError(f"{show(repo_id)} is not the name of a repository. Write 'owner/name'.")


def _find_token(token: str | None) -> str | None:
    """The token that is used."""
    from huggingface_hub import get_token

    return token or get_token()


@contextmanager
def _reach(repo_id: str, done: str, token: str | None) -> Generator[Any]:
    """The Hub; whatever fails on the way is a StoreError without a token.

    repo_id, done: what is done with which repository.
    token: of the Hub.
    """
    from huggingface_hub import HfApi, is_offline_mode

    try:
        yield HfApi(token=token, library_name="dit_lens", library_version=cards.find_version())
    except DitLensError:
        raise
    except Exception as problem:  # noqa: BLE001 its releases use other clients of HTTP, each with errors of its own
        why = " ".join(hide_tokens(str(problem), _find_token(token)).split())[:LONGEST].rstrip(" .")
        remedy = OFFLINE if is_offline_mode() else ONLINE
        raise StoreError(
            f"{repo_id} could not be {done}: {type(problem).__name__}: {why}. {remedy}"
        ) from None  # what it is from may show the headers of the request
