"""Every argument of every pipeline is known: whose it is where a run goes through in batches."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from dit_lens.families import Pipeline
from dit_lens.families.arguments import belongs_to_prompts, holds_text
from dit_lens.families.table import TABLE
from dit_lens.families.table.inputs import INPUTS, find_holding

PIPELINES = {pipeline.name: pipeline for family in TABLE for pipeline in family.pipelines}


def arguments_of(name: str) -> list[str]:
    return [name for name in inspect.signature(getattr(diffusers, name).__call__).parameters if name != "self"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_argument_is_known(name):
    """Fails where diffusers adds an argument: say in ``families/table/inputs.py`` whose it is."""
    unknown = [one for one in arguments_of(name) if not (one in INPUTS or holds_text(one) or belongs_to_prompts(one))]
    assert not unknown


def test_the_table_holds_no_argument_that_no_pipeline_takes():
    taken = {argument for name in PIPELINES for argument in arguments_of(name)}
    assert not INPUTS.keys() - taken
    assert not [name for name in INPUTS if holds_text(name) or belongs_to_prompts(name)]


@pytest.mark.parametrize("field", ["row_images", "prompt_images", "references"])
def test_what_rows_say_of_images_is_of_arguments_that_are_there(field):
    for name, pipeline in PIPELINES.items():
        said = getattr(pipeline, field)
        assert not said or set(said) & set(arguments_of(name)), name


def test_one_name_may_mean_another_thing_elsewhere():
    found = {
        name: find_holding(PIPELINES[name], "image")
        for name in ("FluxImg2ImgPipeline", "FluxKontextPipeline", "Flux2Pipeline", "QwenImageEditPipeline")
    }
    assert list(found.values()) == ["row images", "row images", "whole", "image"]
    assert find_holding(PIPELINES["FluxControlPipeline"], "control_image") == "prompt images"
    assert find_holding(Pipeline("Other", None), "an_argument_of_tomorrow") == "unknown"
