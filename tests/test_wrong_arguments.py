"""Every public call, each argument in turn replaced by what nobody should give: it works, or a DitLensError says why.

A public function without an entry in tests/wrong_arguments/calls.py fails here. DIT_LENS_FUZZ=1 tries every value, and
lets models run; by default some are tried, chosen by a fixed seed, and a call that begins to draw has been accepted.
"""

import fnmatch
import inspect
import os
import random
import time
import warnings
from pathlib import Path

import pytest

import dit_lens as dl
from dit_lens.errors import DitLensError, OpError, show
from tests.wrong_arguments.calls import ELSEWHERE, make_calls, tiny_lens
from tests.wrong_arguments.surface import find_calls
from tests.wrong_arguments.values import make_guises, make_values

THOROUGH = bool(os.environ.get("DIT_LENS_FUZZ"))
TRIED = 3  # values for each argument
# What every run checks, whoever asks for it; the tests of runs try it.
REQUEST = (
    "prompt",
    "prompts",
    "source",
    "target",
    "seed",
    "num_inference_steps",
    "height",
    "width",
    "steps",
    "branch",
    "ops",
    "site",
    "seeds",
    "captions",
)


class Drawn(BaseException):
    """The model was about to run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wrong")


@pytest.fixture(scope="module")
def calls(folder):
    before = Path.cwd()
    os.chdir(folder)
    lens = tiny_lens()
    yield make_calls(lens, folder)
    os.chdir(before)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return make_values(tmp_path_factory.mktemp("values"))


@pytest.fixture
def stopped(calls, monkeypatch):
    if not THOROUGH:
        lens = calls["steer"][1]["lens"]

        def draw(*args, **call):
            raise Drawn

        monkeypatch.setattr(lens.engine, "generate", draw)


def test_every_public_call_has_an_entry(calls):
    known = [*calls, *(name for names in ELSEWHERE.values() for name in names)]
    assert [name for name in find_calls() if not any(fnmatch.fnmatchcase(name, one) for one in known)] == []


def judge(call, arguments):
    """What went wrong, or None: success and a DitLensError are right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**arguments)
    except (DitLensError, Drawn):
        return None
    except Exception as problem:  # noqa: BLE001 what else it may be is the question
        return show(problem)
    return None


def test_what_is_wrong_is_told(calls, values, stopped):
    rng, found = random.Random(0), {}
    for name, (call, right) in calls.items():
        assert judge(call, right) is None, name
        for argument in sorted(right.keys() - (REQUEST if "num_inference_steps" in right else ())):
            chosen = list(values) if THOROUGH else rng.sample(list(values), TRIED)
            for value in chosen:
                found[f"{name}({argument}={value})"] = judge(call, {**right, argument: values[value]()})
    bad = [f"{given}: {problem}" for given, problem in found.items() if problem]
    assert not bad, "\n".join(bad)


@pytest.mark.slow
def test_numbers_of_another_type_or_shape(calls, stopped):
    """What is right, in other types and shapes: it works, or is told."""
    rng, found = random.Random(1), {}
    for name, (call, right) in calls.items():
        for argument in sorted(right):
            guises = make_guises(right[argument])
            for guise in guises if THOROUGH else rng.sample(list(guises), min(TRIED, len(guises))):
                found[f"{name}({argument}={guise})"] = judge(call, {**right, argument: guises[guise]})
    bad = [f"{given}: {problem}" for given, problem in found.items() if problem]
    assert not bad, "\n".join(bad)


def judge_misfit(call, arguments, nearest=""):
    """What went wrong with a call that no function of this library takes, or None."""
    try:
        call(**arguments)
    except DitLensError as problem:
        told = isinstance(problem, TypeError | OpError) and nearest in str(problem)
        return None if told else f"{type(problem).__name__}: {problem}"
    except Exception as problem:  # noqa: BLE001 what else it may be is the question
        return show(problem)
    return "it was taken"


def test_arguments_that_a_call_does_not_have_or_lacks(calls, stopped):
    """Found by Python's own signatures: a name with a slip in it, and each argument without a default left out."""
    ops = {name: (getattr(dl, name), {"site": "blocks.0.img"}) for name in dl.ops.OPS if hasattr(dl, name)}
    found = {}
    for name, (call, right) in {**calls, **ops}.items():
        if not call.__module__.startswith("dit_lens") or name.startswith("metrics."):
            continue  # Python's own mappings, this test's lambdas, and functions of two images
        parameters = inspect.signature(call).parameters
        kinds = [one.kind for one in parameters.values()]
        own = [one for one in parameters if len(one) > 3 and one not in right]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            slip = {f"{own[-1][:-2]}{own[-1][-1]}": 1} if own else {"nothing_like_it": 1}
            found[f"{name}({slip})"] = judge_misfit(call, {**right, **slip}, f"Nearest: {own[-1]!r}" if own else "")
        for lacking, one in parameters.items():
            if lacking in right and one.default is one.empty:
                rest = {argument: value for argument, value in right.items() if argument != lacking}
                found[f"{name}() without {lacking}"] = judge_misfit(call, rest, lacking)
    bad = [f"{given}: {problem}" for given, problem in found.items() if problem]
    assert not bad, "\n".join(bad)
    assert len(found) > 150


@pytest.mark.parametrize("draws", [-1, 10**9, 10**12])
def test_numbers_of_draws_that_no_study_has(calls, draws):
    for name, (call, right) in calls.items():
        if "draws" in right:
            began = time.monotonic()
            with pytest.raises(DitLensError, match="draws"):
                call(**{**right, "draws": draws})
            assert time.monotonic() - began < 10, name
