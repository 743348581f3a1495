"""Protocols set every free choice, say whose each is, and give way to what is given."""

from __future__ import annotations

import inspect
from dataclasses import replace

import diffusers
import pandas as pd
import pytest

import dit_lens as dl
from dit_lens import studies
from dit_lens.errors import OpError
from dit_lens.studies import Result
from dit_lens.studies.shared import protocols

# What a study is run on, and how; not how it measures.
DATA = {"lens", "prompts", "pairs", "captions", "seeds", "judge", "masks", "words", "batch_size", "out"}
DATA |= {"protocol", "shard", "workers", "call"}


def listed(value):
    return list(value) if isinstance(value, tuple) else value


def study_of(**settings):
    @protocols.with_protocols
    def organisation(lens, prompts, *, k=3, method="robust", seeds=(0,), **call):
        """What it does."""
        return Result("organisation", pd.DataFrame(), pd.DataFrame(), {"k": k, "method": method, "call": call})

    return organisation


def test_a_study_without_a_protocol_is_as_it_was():
    study = study_of()
    assert study(None, "a cat", k=4).settings == {"k": 4, "method": "robust", "call": {}}
    assert study.__doc__ == "What it does."
    assert study.__name__ == "organisation"
    assert list(inspect.signature(study).parameters) == ["lens", "prompts", "k", "method", "seeds", "protocol", "call"]


def test_a_protocol_fills_in_what_is_not_given_and_says_whose_it_is():
    result = study_of()(None, "a cat", k=4, protocol="fig3-reproduction", guidance_scale=2)
    assert result.settings["k"] == 4
    assert result.settings["method"] == "minmax"
    assert result.settings["call"]["guidance_scale"] == 2
    told = {choice["argument"]: choice for choice in result.settings["protocol"]["choices"]}
    assert (told["k"]["value"], told["k"]["origin"]) == (4, "yours")
    assert told["method"]["origin"] == "repro"
    assert told["n_clusters"]["origin"] == "paper"
    assert result.notes[-1].startswith("protocol fig3-reproduction; the authors': n_clusters=2, ")
    assert "; given: k=4" in result.notes[-1]


def test_unknown_protocols_and_studies_they_do_not_know():
    with pytest.raises(OpError, match=r"'turri2025' is not a valid protocol\. Nearest: 'turri2026'"):
        study_of()(None, "a cat", protocol="turri2025")
    with pytest.raises(
        OpError, match=r"'fig3-reproduction' says nothing of transfer: .* It sets organisation, stability\."
    ):
        dl.protocols.get("fig3-reproduction").arguments("transfer")


def test_tables_name_every_origin():
    for name in protocols.NAMES:
        table = protocols.get(name).table
        assert set(table["origin"]) <= {"paper", "repro", "ours"}
        assert table["why"].str.len().min() > 0
        assert repr(protocols.get(name)).startswith(f"Protocol {name}: ")


@pytest.mark.parametrize(
    ("name", "study"), [(name, study) for name in protocols.NAMES for study in protocols.get(name).studies]
)
def test_every_free_choice_of_a_study_is_set(name, study):
    parameters = set(inspect.signature(getattr(studies, study)).parameters)
    assert set(protocols.get(name).arguments(study)) == parameters - DATA
    assert "protocol" in parameters


def test_the_authors_and_the_reproduction_score_channels_differently():
    assert protocols.get("turri2026").arguments("organisation")["score"] == "|mean|"
    assert protocols.get("fig3-reproduction").arguments("organisation")["score"] == "mean|x|"
    assert protocols.get("turri2026").studies == [
        "disruption",
        "organisation",
        "transfer",
        "transfer_image",
        "stability",
    ]


@pytest.mark.parametrize("study", ["organisation", "stability"])
def test_studies_run_by_the_reproduction(toy, study):
    prompts = dl.prompts.scenes(2, seed=0).texts
    result = getattr(studies, study)(toy, prompts, protocol="fig3-reproduction", num_inference_steps=2)
    told = protocols.get("fig3-reproduction").arguments(study)
    assert all(str(result.settings[name]) == str(listed(value)) for name, value in told.items())
    assert [choice["origin"] for choice in result.settings["protocol"]["choices"]].count("yours") == 0


def test_a_real_study_runs_by_a_protocol(toy, tmp_path):
    prompt = dl.prompts.scenes(1, seed=0).texts
    choices = {"k": 2, "draws": 1, "confounds": False, "num_inference_steps": 2, "out": tmp_path / "cells"}
    result = studies.disruption(toy, prompt, protocol="turri2026", **choices)
    assert result.settings["protocol"]["name"] == "turri2026"
    assert result.settings["score"] == "|mean|"
    for loaded in (Result.load(result.save(tmp_path / "r")), Result.load(tmp_path / "cells")):
        assert loaded.settings["protocol"]["choices"][1]["origin"] == "yours"
        assert loaded.notes == result.notes
    again = studies.disruption(toy, prompt, protocol="turri2026", **choices)  # what was added does not stand in the way
    assert again.notes == result.notes


def test_every_model_of_the_paper_has_a_row_that_says_whose_it_is():
    protocol = protocols.get("turri2026")
    table = protocol.models
    assert list(table["model"].unique()) == ["FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein", "Qwen-Image", "SANA-1.5"]
    assert set(table["origin"]) <= protocols.ORIGINS.keys() - {"yours", "paper"}  # of no setting the authors' is known
    assert table["why"].str.len().min() > 0
    for row in protocol.rows:
        needed = {"repository", "num_inference_steps", "height", "width", "dtype", "k"}
        assert needed <= row.settings.keys()
        assert row.settings.keys() & {"guidance_scale", "true_cfg_scale"}
        assert row is protocol.find_row(row.repository.upper())
    assert protocol.find_row("black-forest-labs/FLUX.1-kontext") is None
    assert protocols.get("fig3-reproduction").models.empty


PIPELINES = {
    "FLUX.1-dev": "FluxPipeline",
    "FLUX.1-schnell": "FluxPipeline",
    "FLUX.2-klein": "Flux2KleinPipeline",
    "Qwen-Image": "QwenImagePipeline",
    "SANA-1.5": "SanaPipeline",
}


@pytest.mark.parametrize("row", protocols.get("turri2026").rows, ids=lambda row: row.name)
def test_a_row_has_arguments_of_its_pipeline_and_says_defaults_as_they_are(row):
    parameters = inspect.signature(getattr(diffusers, PIPELINES[row.name]).__call__).parameters
    assert row.call.keys() <= parameters.keys()
    for name, value in row.call.items():
        if row.settings[name].origin == "default" and name not in ("height", "width"):
            assert parameters[name].default == value


def test_the_hash_of_a_protocol_follows_its_values_and_not_its_words():
    protocol = protocols.get("turri2026")
    first = protocol.choices[0]
    assert replace(protocol, choices=(replace(first, why="x"), *protocol.choices[1:])).digest == protocol.digest
    assert replace(protocol, choices=(replace(first, value="rms"), *protocol.choices[1:])).digest != protocol.digest
