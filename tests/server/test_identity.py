"""A model that is served is the model itself: a study goes on here and there, and with no other model."""

import copy
import shutil

import pytest
import torch

import dit_lens as dl
from dit_lens import DiTLens
from dit_lens.core.execution.identity import describe_model
from dit_lens.errors import StoreError
from tests import pipelines
from tests.server.conftest import connect


def count(lens):
    """A twin of a lens, and what it ran."""
    twin, made = copy.copy(lens), []
    twin.engine = copy.copy(lens.engine)
    generate = twin.engine.generate
    twin.engine.generate = lambda *args: (made.append(1), generate(*args))[1]
    return twin, made


def study(lens, out):
    return dl.studies.write_attribution(lens, ["red", "blue"], k=3, batch_size=1, num_inference_steps=1, out=out)


def test_a_study_goes_on_here_and_there(here, there, tmp_path):
    whole = study(here, tmp_path / "whole").table
    for number, (first, second) in enumerate([(here, there), (there, here)]):
        out = tmp_path / str(number)
        study(first, out)
        shutil.rmtree(out / "cells" / "000001")
        lens, made = count(second)
        assert study(lens, out).table.equals(whole)
        assert len(made) == 1
    assert describe_model(here) == describe_model(there)


def test_another_model_of_its_class(here, there, start, folder, tmp_path):
    """Elsewhere under the same name: its weights are others."""
    other = tmp_path / "elsewhere" / folder.name
    pipelines.flux(seed=1).save_pretrained(other)
    study(here, tmp_path / "here")
    with pytest.raises(StoreError, match="another model; weights"):
        study(connect(other, start(other).host), tmp_path / "here")
    study(there, tmp_path / "there")
    changed = DiTLens(copy.deepcopy(here.pipe))
    changed.defaults = here.defaults
    with torch.no_grad():
        weight = changed.pipe.transformer.transformer_blocks[0].ff.net[2].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(StoreError, match="another model"):
        study(changed, tmp_path / "there")


def test_a_run_says_whose_weights_it_had(here, there):
    kept = [lens.run("red", seed=0).provenance for lens in (here, there)]
    assert kept[0]["weights"] == kept[1]["weights"] is not None
    assert kept[1]["dtype"] == "float32"
    assert kept[1]["server"]["host"] == there.engine.host
    job = there.submit("red", seed=0)
    assert job.result().provenance["weights"] == kept[0]["weights"]
