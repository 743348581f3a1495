"""What is shared comes back as it was, with a card, and without a place of this machine or a token."""

import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.offline
import pytest
import torch
from PIL import Image

import dit_lens as dl
from dit_lens import DiTLens, Feature, Read, Steering, Swap
from dit_lens.dictionaries import Dictionary
from dit_lens.errors import OpError, StoreError
from dit_lens.hub.privacy import hide_places
from dit_lens.studies import Result
from tests import pipelines
from tests.channel_sets import sample_set
from tests.hub_stand_in import Hub

PLACE = re.compile(r"/(?:root|home|tmp|work|Users|var)/")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", found.client)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_mineminemine")
    return found


@pytest.fixture(scope="module")
def lens():
    found = DiTLens(pipelines.flux())
    found.pipe.register_to_config(_name_or_path="/home/someone/models/tiny")
    return found


def result():
    table = pd.DataFrame({"k": [4], "arm": ["top"], "rmse": [1.5]})
    settings = {"k": [4], "seeds": [0], "model": "/home/someone/models/tiny", "site": "blocks.*.img"}
    images = {"0/0/4/top": Image.new("RGB", (4, 4), "red")}
    return Result("disruption", table, table, settings, images, {"0/0/truth": np.eye(2, dtype=bool)}, ["a note"])


def read(hub, name, file):
    return (hub.place(f"me/{name}") / file).read_text("utf-8")


def test_a_run_comes_back_and_can_be_drawn_again(hub, lens, tmp_path):
    source = lens.run("blue", Read("blocks.1.img"), seed=1, **pipelines.CALL)
    source.save(tmp_path / "source")
    ops = [Swap("blocks.1.img", source=source, channels=[3]), Read("blocks.2.img", reduce="rms")]
    run = lens.run("red", ops, seed=3, **pipelines.CALL)
    assert dl.push_to_hub(run, "me/run", note="Look at channel 3.") == "https://huggingface.co/me/run"
    back = dl.from_hub("me/run")
    assert back.images[0].tobytes() == run.images[0].tobytes()
    assert torch.equal(back["blocks.2.img"], run["blocks.2.img"])
    assert (back.receipt, back.folder, run.folder) == (run.receipt, None, None)
    assert back.spec["ops"][0]["source"] == {"run": "source"}
    assert back.provenance["model"] == "tiny"
    card = read(hub, "run", "README.md")
    for line in ('run = dl.from_hub("me/run")', "| prompt | red |", "| seed | 3 |", "| model | tiny |", "channel 3."):
        assert line in card
    kept = dl.from_hub("me/run", folder=tmp_path / "kept")
    assert kept.folder == tmp_path / "kept"
    again = lens.run("red", seed=3, **pipelines.CALL)
    assert (
        lens.rerun(dl.from_hub(dl.push_to_hub(again, "me/run").removeprefix("https://huggingface.co/"))).table
        is not None
    )
    with pytest.raises(StoreError, match="is not an empty folder"):
        dl.from_hub("me/run", folder=tmp_path / "kept")


def test_what_has_one_file_comes_back(hub):
    steering = Steering({"blocks.1.img": torch.ones(2, 4)}, "mean", (("red", "blue"),), 3, "FLUX.1")
    channels = sample_set(0)
    sae = Dictionary(torch.rand(4, 3), torch.rand(3), torch.rand(3, 4), torch.rand(4))
    for name, thing in (("steering", steering), ("channels", channels), ("sae", sae), ("result", result())):
        dl.push_to_hub(thing, f"me/{name}", facts={"model": "owner/model", "revision": "abc"}, private=True)
        card = read(hub, name, "README.md")
        assert card.startswith("---\nlibrary_name: dit_lens\n")
        assert "| revision | abc |" in card
        assert f'dl.from_hub("me/{name}")' in card
    back = dl.from_hub("me/steering")
    assert torch.equal(back.vectors["blocks.1.img"], steering.vectors["blocks.1.img"])
    assert (back.pairs, back.n, back.family) == (steering.pairs, 3, "FLUX.1")
    assert dl.from_hub("me/channels") == channels
    assert dl.from_hub("me/channels").to_json() == channels.to_json()
    assert dl.from_hub("me/sae").checksum == sae.checksum
    assert (sae.file, dl.from_hub("me/sae").file) == (None, None)
    study = dl.from_hub("me/result")
    assert study.table.equals(result().table)
    assert (list(study.images), study.notes, study.settings["model"]) == (["0/0/4/top"], ["a note"], "tiny")
    assert all(one["private"] for one in hub.made)


def test_a_page_becomes_a_static_space(hub, tmp_path):
    (tmp_path / "atlas.html").write_text("<html>dl.DiTLens.toy('flux') and https://example.org/a/b </html>")
    address = dl.push_to_hub(tmp_path / "atlas.html", "me/atlas", facts={"model": "toy:flux"})
    assert address == "https://huggingface.co/spaces/me/atlas"
    place = hub.place("me/atlas", "space")
    assert (place / "index.html").read_text() == (tmp_path / "atlas.html").read_text()
    assert 'sdk: "static"\n' in (place / "README.md").read_text()
    with pytest.raises(StoreError, match="could not be downloaded"):
        dl.from_hub("me/atlas")
    with pytest.raises(StoreError, match="is not an HTML file"):
        dl.push_to_hub(tmp_path / "atlas.txt", "me/atlas")


def test_no_place_of_this_machine_is_uploaded(hub, lens, tmp_path):
    """Known ones are shortened; whatever else there is stops it, before the Hub is asked for anything."""
    sae = Dictionary(*(torch.rand(shape) for shape in ((32, 3), (3,), (3, 32), (32,))))
    sae.save(tmp_path / "mine.safetensors")
    run = lens.run("red", [Feature("blocks.1.img", sae, 1, 0)], seed=3, **pipelines.CALL)
    run.provenance = {**run.provenance, "server": {"host": "http://10.0.0.5:8001"}, "device": "nnsight server http://x"}
    dl.push_to_hub(run, "me/run")
    dl.push_to_hub(result(), "me/result")
    for file in [one for one in hub.folder.rglob("*") if one.suffix in (".json", ".md")]:
        assert not PLACE.search(file.read_text()), file
        assert "10.0.0.5" not in file.read_text()
    before = list(hub.uploads)
    told = result()
    told.notes.append(f"made in {Path.home() / 'secret project' / 'x'}" if Path.home() != Path("/") else str(tmp_path))
    (tmp_path / "page.html").write_text(f"dl.DiTLens.from_pretrained('{tmp_path}/model')")
    named = Steering({"a": torch.ones(2)}, f"from {tmp_path}/pairs.csv")
    for thing in (told, tmp_path / "page.html", named):
        with pytest.raises(StoreError, match=r"names .*, which is on this machine or in its network, so nothing"):
            dl.push_to_hub(thing, "me/other")
    for place in (str(tmp_path), "/home/gone/data", "C:\\Users\\me\\data"):
        with pytest.raises(StoreError, match="which is on this machine"):
            dl.push_to_hub(result(), "me/other", note=f"see {place}")
    assert hub.uploads == before


LEFT = [
    "file:///{path}",
    "file:/{path}",
    "at:/{path}",
    "x=/{path}",
    "[here](/{path})",
    "https://example.org/?file=/{path}",
    "/{path}",
    "//{path}",
    "~{path}",
    "~/{path}",
    "C:/{path}",
    r"\\{back}",
    r"C:\{back}",
    "sftp://bob@example.org/{path}",
    "https://bob:secret@example.org/{path}",
    "ray://{ip}:10001",
    "http://{ip}/{path}",
    "http://node7:8001",
    "bob@{ip}:/{path}",
    "on {ip}.",
]


@pytest.mark.parametrize("form", LEFT)
def test_no_form_of_a_path_or_server_is_uploaded(hub, form):
    """Of random names that are not on this machine: in a note, a fact, an origin and a table of notes."""
    rng = random.Random(form)
    names = ["".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(3)]
    ip = f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
    place = form.format(path="/".join(names), back="\\".join(names), ip=ip)
    assert not Path("/", *names).exists()
    said = f"trained with {place} and more"
    told = result()
    told.notes.append(said)
    sae = Dictionary(torch.rand(4, 3), torch.rand(3), torch.rand(3, 4), torch.rand(4), origin=said)
    for thing, more in (
        (told, {}),
        (sae, {}),
        (sample_set(0), {"note": said}),
        (sample_set(0), {"note": place}),
        (sample_set(0), {"facts": {"data": said}}),
        (sample_set(0), {"facts": {said: 1}}),
    ):
        with pytest.raises(StoreError, match="so nothing was uploaded"):
            dl.push_to_hub(thing, "me/other", **more)
    assert not hub.uploads


def test_a_page_is_refused_for_the_same_places_and_no_code(hub, tmp_path):
    """The code of a page is full of strokes and backslashes, and so are drawings of dots."""
    page, code = tmp_path / "page.html", plotly.offline.get_plotlyjs()
    page.write_text(f'<script>{code}</script><path d="M10.5.5.5z"/><p>a/b</p>')
    dl.push_to_hub(page, "me/page")
    for place in (
        "file:///home/bob/x",
        "at:/home/bob/x",
        "\\\\\\\\server\\\\bob",
        "ray://10.0.0.4:10001",
        str(tmp_path),
    ):
        page.write_text(f"<script>{{a: '{place}'}}</script>")
        with pytest.raises(StoreError, match="which is on this machine"):
            dl.push_to_hub(page, "me/page")


def test_what_only_looks_like_a_place_is_shared(hub):
    said = (
        "red and/or blue, 1/2, 24/7, +/-1/2, ~1/2, 50%/20/30, 2 $/GPU/h, f(x)/g/h, blocks.*/img/x, [step, row], n/a, "
        r"$\alpha\beta\gamma$, version 1.2.3.4 of /usr/bin/python, black-forest-labs/FLUX.1-dev, hf://me/x/y, "
        "https://huggingface.co/black-forest-labs/FLUX.1-dev, (https://arxiv.org/abs/2606.15796), "
        "git+https://github.com/me/x, a risk-of-a-very-long-name-with-more, sk-learn-based-dictionaries\n/one\n"
    )
    told = result()
    told.notes.append(said)
    dl.push_to_hub(told, "me/told", note=said, facts={"said": said})
    assert said in read(hub, "told", "README.md")
    assert dl.from_hub("me/told").notes[-1] == said


def test_what_people_say_is_never_changed():
    said = {"prompt": ["/home/a/b"], "call": {"negative_prompt": "/x/y", "height": 8, "folder": "C:\\Users\\me\\x"}}
    assert hide_places(said) == {**said, "call": {**said["call"], "folder": "x"}}
    assert hide_places("and/or") == "and/or"
    assert hide_places("/root/.cache/hub/models--black--FLUX.1/snapshots/0a1b") == "black/FLUX.1"
    assert hide_places(str(dl.toys.path("flux"))) == "toy:flux"


def test_no_token_is_written_or_told(hub, monkeypatch):
    with pytest.raises(
        StoreError, match=r"could not be downloaded: FileNotFoundError: 404 for me/none .* \*\*\*"
    ) as told:
        dl.from_hub("me/none", token="my-own-token")
    assert told.value.__cause__ is None
    hub.fails = ConnectionError("refused: my-own-token and hf_mineminemine")
    with pytest.raises(StoreError, match=r"could not be pushed: ConnectionError: refused: \*\*\* and \*\*\*\."):
        dl.push_to_hub(sample_set(0), "me/channels", token="my-own-token")
    assert hub.tokens == ["my-own-token", "my-own-token"]
    hub.fails = None
    signs = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=36))
    begins = "hf_ api_org_ ghp_ gho_ ghs_ github_pat_ glpat- sk- sk-proj- sk-ant-api03- xoxb- npm_ pypi- gsk_ nvapi-"
    whole = ["hf_mineminemine", f"AIza{signs[:35]}", "AKIAABCDEFGHIJKLMNOP", f"eyJ{signs}.eyJ{signs}.{signs}"]
    for secret in (*whole, *(f"{begin}{signs}" for begin in begins.split())):
        with pytest.raises(StoreError, match="would hold an access token") as told:
            dl.push_to_hub(sample_set(0), "me/channels", note=f"use {secret}")
        assert secret not in str(told.value)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    dl.push_to_hub(sample_set(0), "me/channels")
    assert hub.tokens[-1] is None


def test_an_error_of_the_hub_ends_once_and_says_what_helps(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for said in ("no such repository", "no such repository.", "no such repository ...", "no such\nrepository. \n"):
        hub.fails = OSError(said)
        with pytest.raises(StoreError, match=r"OSError: no such repository\. Check its name, that you are logged in"):
            dl.from_hub("me/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for ask in (lambda: dl.from_hub("me/none"), lambda: dl.push_to_hub(sample_set(0), "me/none")):
        with pytest.raises(StoreError, match=r"repository\. HF_HUB_OFFLINE .*is set.*Unset it") as told:
            ask()
        assert "logged in" not in str(told.value)


@pytest.mark.parametrize("name", ["channels", "a b/c", "a/b/c", "", "https://huggingface.co/me/x"])
def test_names_are_checked(hub, name):
    with pytest.raises(StoreError, match="Write 'owner/name'"):
        dl.from_hub(name)
    with pytest.raises(StoreError, match="Write 'owner/name'"):
        dl.push_to_hub(sample_set(0), name)


def test_what_cannot_be_shared_or_was_not_is_told(hub):
    with pytest.raises(OpError, match=r"cannot be shared\. Give one of Run, Result, Steering"):
        dl.push_to_hub(3, "me/x")
    hub.place("me/other").mkdir(parents=True)
    (hub.place("me/other") / "config.json").write_text(json.dumps({}))
    with pytest.raises(StoreError, match="holds nothing that push_to_hub wrote"):
        dl.from_hub("me/other")
