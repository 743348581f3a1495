"""Folders that are written again keep what others put into them, and what is no file is never read."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

import dit_lens as dl
from dit_lens import Run
from dit_lens.core.runs.files import read_json
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.studies import Result

STORED = Path(__file__).parents[2] / "fixtures" / "saved_by_0_1_0"
KINDS = {"edits": Run, "organisation": Result}  # of what this and an earlier release saved


def contents(folder):
    """Every file and link below a folder: path -> bytes, or where a link leads; and every folder that is empty."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = None
    return found


def scatter(folder, rng):
    """Puts files of a user into a folder and its folders, some named much like its own; returns what they are."""
    names = ["notes.txt", "run.json.bak", "images/000.png.txt", "images/00.png", "images/mine.png", "old/run.json"]
    names += ["images/more/000.png", "x/latents.safetensors", ".hidden", "figures/a/b.csv", "result.json~", "0000.png"]
    before = contents(folder)
    for name in rng.sample(names, 8):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(5))
    (folder / "empty" / "inner").mkdir(parents=True)
    (folder / "link").symlink_to("/nowhere")
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "way").symlink_to(folder.parent)
    return {name: value for name, value in contents(folder).items() if name not in before}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_files_are_replaced(tmp_path, kind, seed):
    folder = tmp_path / "saved"
    shutil.copytree(STORED / kind, folder)
    theirs = scatter(folder, random.Random(seed))
    saved = KINDS[kind].load(folder)
    if kind == "edits":
        saved.images.pop()  # so that one of the old images has no successor
    fresh = contents(saved.save(tmp_path / "fresh"))
    saved.save(folder, overwrite=True)
    assert contents(folder) == fresh | theirs
    assert KINDS[kind].load(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dit_lens.lock", "fresh", "saved"]


def test_a_disk_without_hard_links_has_copies(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no hard links here")

    folder = tmp_path / "saved"
    shutil.copytree(STORED / "edits", folder)
    theirs = scatter(folder, random.Random(0))
    monkeypatch.setattr(os, "link", refuse)
    Run.load(folder).save(folder, overwrite=True)
    assert contents(folder).items() >= theirs.items()


def test_a_file_that_cannot_be_kept_leaves_all_as_it_was(tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(STORED / "edits", folder)
    run = Run.load(folder)
    shutil.rmtree(folder / "images")
    (folder / "images").write_text("mine, where the run has a folder")
    before = contents(folder)
    with pytest.raises(StoreError, match="could not be written"):
        run.save(folder, overwrite=True)
    assert contents(folder) == before


def test_what_a_writer_that_died_had_set_aside_is_kept(tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(STORED / "edits", folder)
    run = Run.load(folder)
    theirs = scatter(folder, random.Random(0))
    folder.rename(tmp_path / ".saved.old")  # the writer died here
    with pytest.raises(StoreError, match="exists already"):
        run.save(folder)
    run.save(folder, overwrite=True)
    assert contents(folder).items() >= theirs.items()


@pytest.fixture
def bounded():
    """A read that does not end fails after ten seconds."""

    def stop(*_):
        raise AssertionError("it is still being read")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_endless(path, kind):
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("endless", ["pipe", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_end_is_not_read(tmp_path, bounded, kind, endless):
    names = [path.relative_to(STORED / kind) for path in (STORED / kind).rglob("*") if path.is_file()]
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        shutil.copytree(STORED / kind, folder)
        make_endless(folder / name, endless)
        with pytest.raises(StoreError, match=r"not a file|outside itself"):
            KINDS[kind].load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_images_that_leads_elsewhere_is_not_read(tmp_path, kind):
    folder = tmp_path / "saved"
    shutil.copytree(STORED / kind, folder)
    (images,) = (path for path in folder.iterdir() if path.is_dir())
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="outside itself"):
        KINDS[kind].load(folder)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_a_pipeline_with_a_pipe_is_not_loaded(tmp_path, bounded, name):
    shutil.copytree(dl.toys.path("flux"), tmp_path / "toy")
    make_endless(tmp_path / "toy" / name, "pipe")
    for load in (DiTLens.from_pretrained, dl.recommend):
        with pytest.raises(StoreError, match=r"not a file|not a diffusers pipeline"):
            load(tmp_path / "toy")


def test_json_of_a_device_is_not_read(bounded):
    with pytest.raises(StoreError, match="not a file"):
        read_json("/dev/zero", "a test")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    saved = KINDS[kind].load(STORED / kind)
    for given in ("~/a", Path("~/b")):
        saved.save(given)
        assert KINDS[kind].load(given)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [".dit_lens.lock", "a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
