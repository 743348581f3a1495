"""Whatever is given where a value is expected: it works, or a DitLensError says before the first forward pass why not.

What only the run can tell is an ExecutionError or OpError that names the site and the step. Forward passes of the
transformer are counted by a plain hook.
"""

import re
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dit_lens import Add, Apply, DiTLens, MeanAblate, Read, Resample, Scale, Swap, TokenMean, Zero
from dit_lens.errors import DitLensError, ExecutionError, OpError
from dit_lens.ops import OPS, from_json, to_json
from tests import pipelines
from tests.examples import examples
from tests.wrong_values import OTHER, SITE, VALUES, answer

CALL = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "latent"}
CHECKS = {"suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults={**pipelines.TRUE_CFG, **CALL})


@pytest.fixture(scope="module")
def run(lens):
    """A run whose reads are given as sources."""
    return lens.run("red", [Read(SITE), Read(OTHER, reduce="mean", name="named")], seed=0)


@pytest.fixture(scope="module")
def attempt(lens):
    """Calls a function, and fails if what it raises is not told, or told too late."""
    forwards = []
    lens.pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))

    def attempt(call):
        forwards.clear()
        told = None
        try:
            call()
        except DitLensError as problem:
            told = problem
        late = told is not None and len(forwards) > 0
        assert not late or isinstance(told, ExecutionError | OpError), told
        assert not late or re.search(r"(blocks\.\d|velocity|final|x0).*step \d", str(told)), told

    return attempt


def legal(run):
    """Every op as it works; of its fields some are replaced."""
    return st.sampled_from(
        [
            Read(SITE),
            Read(OTHER, reduce="mean"),
            Zero(SITE),
            Scale(SITE, factor=2.0),
            Add(SITE, value=1.0),
            Swap(SITE, source="row:0"),
            Swap(SITE, source=run, strength=0.5),
            Swap(SITE, source=run.readings[0]),
            Swap(OTHER, source=torch.ones(32)),
            Resample(SITE, source=run),
            TokenMean(SITE),
            MeanAblate(OTHER, mean=run),
            Apply(SITE, fn=answer(None)),
        ]
    )


@st.composite
def changed(draw, run):
    """A function that makes an op with one or two strange values."""
    op = draw(legal(run))
    names = draw(st.lists(st.sampled_from([f.name for f in fields(op)]), min_size=1, max_size=2, unique=True))
    given = {f.name: getattr(op, f.name) for f in fields(op)} | {
        name: draw(st.one_of(VALUES, VALUES, st.just(run), st.just(run.readings[1]))) for name in names
    }
    return lambda: type(op)(**given)


@examples(120, **CHECKS)
@given(st.data())
def test_fields_of_ops(lens, run, attempt, data):
    make = data.draw(changed(run))
    attempt(lambda: lens.run("red", make(), seed=0))


@examples(50, **CHECKS)
@given(st.data())
def test_json_of_ops(lens, run, attempt, data):
    make = data.draw(changed(run))
    attempt(lambda: from_json(to_json(make())))


ARGUMENTS = {
    "prompt": lambda lens, value: lens.run(value, seed=0),
    "outline": lambda lens, value: lens.outline(value),
    "seed": lambda lens, value: lens.run("red", seed=value),
    "batch_size": lambda lens, value: lens.run(["red", "blue"], batch_size=value, seed=0),
    "negative_prompt": lambda lens, value: lens.run("red", negative_prompt=value, seed=0),
    "run": lambda lens, value: lens.run("red", value, seed=0),
    "cost": lambda lens, value: lens.cost("red", value),
    "record": lambda lens, value: lens.run("red", record=value, seed=0),
    "prefix": lambda lens, value: lens.run("red", prefix=value, seed=0),
    "run_with_cache": lambda lens, value: lens.run_with_cache("red", value, seed=0),
    "run_with_hooks": lambda lens, value: lens.run_with_hooks("red", value, seed=0),
    "hook": lambda lens, value: lens.run_with_hooks("red", [(SITE, value)], seed=0),
    "hooked site": lambda lens, value: lens.run_with_hooks("red", [(value, answer(0.5))], seed=0),
    "trace": lambda lens, value: lens.trace("red", ops=value),
    "sites": lambda lens, value: lens.sites(value),
    "heads": lambda lens, value: lens.heads(value),
    "to_str_tokens": lambda lens, value: lens.to_str_tokens(value),
    "rerun": lambda lens, value: lens.rerun(value),
    "run_spec": lambda lens, value: lens.run_spec(value),
    "from_json": lambda lens, value: from_json(value),
    "to_json": lambda lens, value: to_json(value),
    "select": lambda lens, value: lens.outline("red").select(value),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@examples(12, **CHECKS)
@given(value=VALUES)
def test_arguments(lens, attempt, name, value):
    attempt(lambda: ARGUMENTS[name](lens, value))


@examples(25, **CHECKS)
@given(st.data())
def test_specs(lens, run, attempt, data):
    """The spec of a run, with a part of it missing, or its ops or one of their fields replaced."""
    spec = {**run.spec, "call": dict(run.spec["call"]), "ops": [dict(op) for op in run.spec["ops"]]}
    place = data.draw(st.sampled_from([spec, spec["call"], spec["ops"][0]]))
    key = data.draw(st.sampled_from(sorted(place)))
    if place is spec["ops"][0] or (key in ("ops", "call") and data.draw(st.booleans())):
        place[key] = data.draw(VALUES)
    else:
        place.pop(key)
    attempt(lambda: lens.run_spec(spec))


@examples(30, **CHECKS)
@given(
    st.sampled_from(sorted(OPS)), st.dictionaries(st.sampled_from(["site", "op", "value", "steps", "source"]), VALUES)
)
def test_json_written_by_hand(lens, attempt, kind, values):
    attempt(lambda: lens.run("red", from_json({"op": kind, "site": SITE, **values}), seed=0))
