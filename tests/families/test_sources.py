"""What the rows declare of pipelines and models is what the source of diffusers says, for every class there is."""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest

from dit_lens.errors import FamilyError
from dit_lens.families import find_by_pipeline, sources
from dit_lens.families.table import TABLE

FAMILIES = {family.name: family for family in TABLE}


def pipelines_of(transformer):
    """Every pipeline class of diffusers whose constructor takes this class of transformer."""
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    for kind in classes:
        parameter = inspect.signature(kind).parameters.get("transformer") if inspect.isclass(kind) else None
        if parameter is not None and re.search(rf"\b{transformer}\b", str(parameter.annotation)):
            yield kind


@pytest.fixture(scope="module")
def classes():
    return {name: {kind.__name__: kind for kind in pipelines_of(row.transformer)} for name, row in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pipeline_of_a_model_is_declared(name, classes, monkeypatch):
    monkeypatch.setattr("dit_lens.families.registry.REGISTERED", [])
    assert sorted(pipeline.name for pipeline in FAMILIES[name].pipelines) == sorted(classes[name])
    for kind in classes[name].values():
        assert find_by_pipeline(kind) is FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_declared_of_pipelines_is_what_their_source_says(name, classes):
    for pipeline in FAMILIES[name].pipelines:
        kind = classes[name][pipeline.name]
        parameters = inspect.signature(kind.__call__).parameters
        assert pipeline.encodes == sources.find_encoded(kind), kind
        assert pipeline.takes_latents == sources.find_latents(kind), kind
        assert (pipeline.returns_latents is not None) == sources.returns_latents(kind), kind
        assert ("pag_scale" in parameters) == any(one.argument == "pag_scale" for one in pipeline.refuses), kind
        assert all(one.argument in parameters for one in pipeline.refuses if pipeline.tested), kind
        assert not pipeline.needs_image or "image" in parameters, kind


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_declared_of_autoencoders_is_what_the_source_of_pipelines_says(name, classes):
    usual = FAMILIES[name].pipelines[0]
    source = inspect.getsource(inspect.getmodule(classes[name][usual.name]))
    by = "token" if "vae.bn" in source else "channel" if "latents_mean" in source else "factor"
    assert FAMILIES[name].latents.normalised == by


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_declared_of_gradients_is_what_the_modules_say(name):
    family = FAMILIES[name]
    transformer = getattr(diffusers, family.transformer)(**family.example.config)
    assert family.without_gradient == sources.find_without_gradient(transformer)


def test_a_pipeline_that_is_not_as_declared_is_refused():
    class Mine(diffusers.FluxPipeline):
        def encode_prompt(self, prompt):
            return pooled_prompt_embeds, prompt_embeds  # noqa: F821

    assert FAMILIES["FLUX.1"].pipeline(Mine).name == "FluxPipeline"
    with pytest.raises(FamilyError, match=r"encodes=.* is declared, and its source says .*pooled_prompt_embeds"):
        sources.check_source(Mine, FAMILIES["FLUX.1"], "encodes")
    sources.check_source(Mine, FAMILIES["FLUX.1"], "takes_latents")
