"""What works on this machine with a model, said in one go and as JSON."""

import itertools
import json

import pytest
import torch

from dit_lens import DiTLens
from dit_lens.commands import cli, doctor
from dit_lens.commands.doctor import examine
from tests import pipelines


@pytest.fixture
def lens(embedded):
    return DiTLens(pipelines.flux(embedded=embedded), defaults=pipelines.call_for(embedded))


def test_what_is_found(lens, embedded):
    diagnosis = examine(lens)
    assert diagnosis.ok
    assert [finding.name for finding in diagnosis.findings] == [
        "family",
        "machine",
        "weights",
        "memory",
        "drawing",
        "identity",
        "massive",
    ]
    assert diagnosis["family"].data["checks"] == [check.name for check in lens.checks]
    parts = diagnosis["weights"].data["parts"]
    assert parts["transformer"] == {
        "parameters": sum(p.numel() for p in lens.pipe.transformer.parameters()),
        "bytes": sum(4 * p.numel() for p in lens.pipe.transformer.parameters()),
    }
    assert diagnosis["drawing"].data["grid"] == list(pipelines.GRID)
    assert diagnosis["drawing"].data["calls_per_step"] == (1 if embedded else 2)
    assert diagnosis["drawing"].data["seconds_per_step"] > 0
    assert diagnosis["identity"].data["identical"] is True
    assert len(diagnosis["massive"].data["channels"]) == doctor.TOP
    assert "published" not in diagnosis["massive"].data
    for finding in diagnosis.findings:
        assert finding.says in repr(diagnosis)
    assert json.loads(json.dumps(diagnosis.to_json()))["ok"] is True
    assert not any(module._forward_hooks for module in lens.pipe.transformer.modules())  # noqa: SLF001


def test_published_channels_where_the_width_fits(lens, monkeypatch):
    monkeypatch.setitem(doctor.PUBLISHED, ("FLUX.1", pipelines.WIDTH), ((5, 9), "a paper"))
    massive = examine(lens)["massive"]
    assert [found["channel"] for found in massive.data["published"]] == [5, 9]
    assert "Published: 5 (" in massive.says
    assert massive.says.endswith("(a paper)")


def test_channels_that_stand_out_are_named(lens):
    """A channel of the input embedding's bias is made massive: it leads every block."""
    with torch.no_grad():
        lens.pipe.transformer.x_embedder.bias[7] = 300.0
    (first, *_) = examine(lens)["massive"].data["channels"]
    assert (first["channel"], first["blocks"]) == (7, pipelines.DEPTH)
    assert first["largest_over_median"] > 50


def test_a_machine_that_does_not_repeat_itself(lens, monkeypatch):
    step, count = lens.pipe.scheduler.step, itertools.count()

    def shaky(*args, **kwargs):
        (moved,) = step(*args, **{**kwargs, "return_dict": False})
        return (moved + next(count),)

    monkeypatch.setattr(lens.pipe.scheduler, "step", shaky)
    diagnosis = examine(lens)
    assert not diagnosis.ok
    assert diagnosis["identity"].state == "failed"
    assert "this machine does not repeat itself" in diagnosis["identity"].says
    assert "not all is well" in repr(diagnosis)


def test_a_lens_that_changes_the_image(lens, monkeypatch):
    run = lens.run

    def changed(*args, **kwargs):
        found = run(*args, **kwargs)
        found.images = [image.transpose(0) for image in found.images]
        return found

    monkeypatch.setattr(lens, "run", changed)
    assert "Please report this pipeline" in examine(lens)["identity"].says


def test_what_cannot_be_drawn_is_a_finding(lens):
    lens.release_encoders()
    drawing = examine(lens)["drawing"]
    assert drawing.state == "failed"
    assert "Error" in drawing.says


def test_a_pipeline_that_does_not_fit_is_not_moved(lens, monkeypatch):
    monkeypatch.setattr(doctor, "check_device", lambda device: device)  # as where there is a GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (1000, 2000))
    diagnosis = examine(lens, device="cuda")
    assert diagnosis["memory"].state == "failed"
    assert "dit_lens.recommend" in diagnosis["memory"].says
    assert diagnosis["drawing"].state == "skipped"
    assert not diagnosis.ok
    assert lens.pipe.device.type == "cpu"


def test_large_models_draw_small_images_on_a_cpu(lens, monkeypatch):
    monkeypatch.setattr(doctor, "LARGE", 1)
    monkeypatch.setattr(doctor, "SMALL_SIDE", 16)
    assert examine(lens)["drawing"].data["grid"] == [4, 4]


def test_classes_in_the_place_of_prompts():
    from tests import zoo

    entry = next(entry for entry in zoo.entries() if entry.name == "dit")
    assert examine(DiTLens(entry.build()))["identity"].state == "ok"


def test_the_command(capsys):
    assert cli.main(["doctor", "toy:flux", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "bit for bit" in said
    assert cli.main(["doctor", "toy:flux", "--device", "cpu", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["machine"]["dtype"] == "float32"


def test_the_command_says_what_failed_by_its_exit_code(monkeypatch, capsys):
    found = doctor.Diagnosis("model", (doctor.Finding("drawing", "failed", "why"),))
    monkeypatch.setattr(doctor, "examine", lambda lens, device: found)
    assert cli.main(["doctor", "toy:flux", "--device", "cpu", "--dtype", "bfloat16"]) == 1
    assert "why" in capsys.readouterr().out
