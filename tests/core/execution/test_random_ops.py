"""Random ops on tiny pipelines of six families: what ``lens.run`` gives is what plain torch hooks give, bit for bit."""

import json
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS

from dit_lens import Run
from dit_lens.ops import Apply, AttentionMask, Feature, ReadFeatures, TokenMean, from_json, to_json
from tests.examples import examples
from tests.interpreter import Interpreter, as_list, outer
from tests.random_ops.scenarios import SUBJECTS, Scenario, lens_of, pipe_of
from tests.random_ops.strategies import scenarios

pytestmark = pytest.mark.slow

# Every example is drawn by itself: Hypothesis would make most of them by changing the one before.
AVAILABLE_PROVIDERS["independent"] = AVAILABLE_PROVIDERS["hypothesis"]
CHOICES = {
    "backend": "independent",
    "phases": [Phase.generate],  # a case that fails is shown as it was drawn: to make it smaller takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_places_are_those_of_the_library(name):
    """A pattern means the same sites to both, so that no op is carried out at more of them."""
    wiring = SUBJECTS[name].wiring
    for point in {site.split(".", 3)[3] for site in wiring.places if site.count(".") > 2} | {"resid_post"}:
        pattern = f"blocks.*.*.{point}"
        assert lens_of(name).sites(pattern) == wiring.expand(pattern)
    assert set(wiring.places) <= set(lens_of(name).sites("*"))


@examples(44, **CHOICES)
@given(scenarios("flux"))
def test_flux(scenario):
    check(scenario)


@examples(12, **CHOICES)
@given(scenarios("flux-embedded"))
def test_flux_with_embedded_guidance(scenario):
    check(scenario)


@examples(8, **CHOICES)
@given(scenarios("flux-half"))
def test_flux_in_half_precision(scenario):
    check(scenario)


@examples(32, **CHOICES)
@given(scenarios("sd3"))
def test_sd3(scenario):
    check(scenario)


@examples(20, **CHOICES)
@given(scenarios("qwen"))
def test_qwen_image(scenario):
    check(scenario)


@examples(20, **CHOICES)
@given(scenarios("zimage"))
def test_zimage(scenario):
    check(scenario)


@examples(20, **CHOICES)
@given(scenarios("sana"))
def test_sana(scenario):
    check(scenario)


@examples(20, **CHOICES)
@given(scenarios("wan"))
def test_wan(scenario):
    check(scenario)


@examples(6, **CHOICES)
@given(scenarios("klein"))
def test_flux2_klein(scenario):
    check(scenario)


@examples(6, **CHOICES)
@given(scenarios("ernie"))
def test_ernie_image(scenario):
    check(scenario)


@examples(6, **CHOICES)
@given(scenarios("hunyuan_dit"))
def test_hunyuan_dit(scenario):
    check(scenario)


@examples(6, **CHOICES)
@given(scenarios("lumina2-ragged"))
def test_lumina2(scenario):
    check(scenario)


def check(scenario: Scenario):
    """Everything a run leaves, against the interpreter."""
    note(repr(scenario))
    logs = [op.fn.calls for op in scenario.ops if isinstance(op, Apply)]
    run = carry_out(scenario)
    theirs = taken(logs)
    interpreter = Interpreter(
        scenario.subject.wiring,
        pipe_of(scenario.name),
        scenario.forwards,
        scenario.ops,
        scenario.steps,
        scenario.texts,
        scenario.rows,
    )
    truth = interpreter.draw(scenario.batches())
    compare_calls(scenario, theirs, taken(logs))
    compare_reads(scenario, interpreter, run, truth)
    compare_receipt(scenario, run, truth)
    compare(scenario, run.latents, truth.latents, "latents")
    assert [(step, time) for step, time, _ in run.clock] == [(i, time) for i, (time, _) in enumerate(truth.clock)]
    assert run.sigmas == pytest.approx([sigma for _, sigma in truth.clock], abs=scenario.subject.level)
    assert run.grid == scenario.subject.wiring.grid
    if scenario.told:
        compare_forecast(scenario, run)
    if scenario.saved:
        compare_saved(scenario, run)
        taken(logs)


def carry_out(scenario):
    """A run by the lens, its ops given as they are, as JSON, or in a with block."""
    ops, options = scenario.ops, {"batch_size": scenario.batch} if scenario.batch else {}
    if scenario.recorded:
        options["prefix"] = scenario.run(record=True)
    if scenario.way == "json":
        ops = [from_json(json.loads(json.dumps(to_json(op)))) for op in ops]
    if scenario.way != "trace":
        return scenario.run(ops, **options)
    prompt, call = scenario.asked(**options)
    with lens_of(scenario.name).trace(prompt, **call) as trace:
        handles = []
        for op in ops:
            method = {
                "ReadFeatures": "read_features",
                "TokenMean": "token_mean",
                "MeanAblate": "mean_ablate",
                "AttentionMask": "attention_mask",
            }.get(type(op).__name__, type(op).__name__)
            values = {field.name: getattr(op, field.name) for field in fields(op) if field.name != "site"}
            handles.append(getattr(trace, method.lower())(op.site, **values))
    reads = [handle.reading for handle in handles if handle is not None]
    assert all(one is other for one, other in zip(reads, trace.run.readings, strict=True))
    return trace.run


def compare_forecast(scenario, run):
    """What the lens says of a run beforehand is what it was."""
    lens, wiring = lens_of(scenario.name), scenario.subject.wiring
    prompt, call = scenario.asked()
    outline = lens.outline(prompt, **call)
    assert (outline.rows, outline.steps, list(outline.branches)) == (scenario.rows, scenario.steps, scenario.branches)
    assert outline.grid == (wiring.grid if wiring.knows_grid else None)
    if wiring.text is not None:  # elsewhere they are those that cross-attention looks at
        assert outline.text_tokens in (wiring.text, None)
    if outline.sigmas is not None:
        assert list(outline.sigmas) == pytest.approx(run.sigmas, abs=scenario.subject.level)
    cost = lens.cost(prompt, scenario.ops, **call)
    kept = sum(value.nbytes for reading in run.readings for value in reading.tensors.values())
    assert cost.bytes == kept if cost.complete else cost.bytes <= kept


def compare_saved(scenario, run):
    """A loaded run equals the saved one; one with texts is drawn again from its spec."""
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder) / "run")
        loaded = Run.load(Path(folder) / "run")
    assert torch.equal(loaded.latents, run.latents)
    assert loaded.receipt == run.receipt
    assert (loaded.clock, loaded.grid) == (run.clock, run.grid)
    for one, other in zip(loaded.readings, run.readings, strict=True):
        assert {**vars(one), "tensors": None} == {**vars(other), "tensors": None}
        assert list(one.tensors) == list(other.tensors)
        assert all(torch.equal(one.tensors[site], other.tensors[site]) for site in one.tensors)
    if scenario.texts is not None and scenario.way == "json" and not scenario.batch:
        again = lens_of(scenario.name).run_spec(json.loads(json.dumps(run.spec)))
        assert torch.equal(again.latents, run.latents)


def is_exact(scenario):
    """Edges are knocked out of one call of attention in double precision; sums of columns or of strides differ."""
    edges = any(isinstance(op, AttentionMask | Feature | ReadFeatures) for op in scenario.ops)
    return not edges and not (scenario.subject.strided and any(isinstance(op, TokenMean) for op in scenario.ops))


def compare(scenario, ours, theirs, what, *, within=0.0):
    """Bit for bit, or up to rounding: within so much, and a little more where the model itself rounds otherwise."""
    within = within if is_exact(scenario) else max(within, scenario.subject.rounding)
    assert ours.shape == theirs.shape, what
    if within == 0:
        assert ours.dtype == theirs.dtype, what
        assert torch.equal(ours, theirs), f"{what} differs by {(ours - theirs).abs().max()}"
    else:
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within, msg=lambda text: f"{what}: {text}")


def taken(logs):
    """What functions have noted, which begin anew."""
    found = list(logs[0]) if logs else []
    if logs:
        logs[0].clear()
    return found


def compare_calls(scenario, ours, theirs):
    """Functions are called in one order, with the same elements."""
    assert [call[:5] for call in ours] == [call[:5] for call in theirs]
    assert [call[5] for call in ours] == pytest.approx([call[5] for call in theirs], abs=scenario.subject.level)
    for one, other in zip(ours, theirs, strict=True):
        compare(scenario, one[6], other[6], f"{one[:5]}")


def compare_reads(scenario, interpreter, run, truth):
    """Values bit for bit, reductions and what is computed up to rounding; and what each says it holds.

    Reductions are of float32 in every precision.
    """
    readings = iter(run.readings)
    for number, found in truth.reads.items():
        op, reading = scenario.ops[number], next(readings)
        assert set(reading) == set(found)
        for site, value in found.items():
            ours = reading[site].as_subclass(torch.Tensor)
            made = scenario.subject.wiring.places[site].made is not None
            within = scenario.subject.rounding if made else 0.0 if op.reduce is None else 1e-5
            compare(scenario, ours, value, f"ops[{number}] {site}", within=within)
            chosen = tuple(interpreter.channels_of(op, site))
            if isinstance(op, ReadFeatures):
                chosen = tuple(range(12)[feature] for feature in as_list(op.features))
            assert reading.channels[site] == (None if op.channels is None and not reading.features else chosen)
        tokens = [tuple(tokens) for rows, tokens in interpreter.groups(op, site) for _ in rows]
        assert reading.name == (op.name or "")
        assert reading.steps == tuple(interpreter.steps_of(op))
        assert reading.total_steps == scenario.steps
        assert reading.branches == (("cond", "uncond") if op.branch == "both" else (op.branch or "cond",))
        assert reading.rows == tuple(interpreter.rows_of(op))
        if op.tokens is None and op.mask is None:
            assert reading.tokens is None
        else:  # a word is elsewhere in other prompts
            elsewhere = dict.fromkeys(reading.branches, tuple(tokens))
            assert reading.tokens == (tokens[0] if len(set(tokens)) == 1 else elsewhere)
        assert reading.reduce == op.reduce
    assert next(readings, None) is None


def compare_receipt(scenario, run, truth):
    """The receipt names the elements that hooks touched, at the same steps, and how far they changed."""
    entries = {}
    for entry in run.receipt.entries:
        entries.setdefault((entry.op, entry.site, entry.branch), []).append(entry)
    assert set(entries) == set(truth.touched)
    for key, touches in truth.touched.items():
        number, *_ = key
        steps = sorted(touches)
        elements = touches[steps[0]].elements
        named = torch.zeros_like(elements, dtype=torch.int)
        for entry in entries[key]:
            lists = (entry.rows, entry.tokens, entry.channels)
            index = [list(range(size) if kept is None else kept) for kept, size in zip(lists, named.shape, strict=True)]
            named[outer(*index)] += 1
            assert entry.kind == type(scenario.ops[number]).__name__
            assert entry.steps == tuple(steps)
            assert entry.elements == len(index[0]) * len(index[1]) * len(index[2])
        assert torch.equal(named, elements.int()), key
        for i, step in enumerate(steps):
            assert torch.equal(touches[step].elements, elements)
            before = sum(entry.before[i] ** 2 for entry in entries[key]) ** 0.5
            after = sum(entry.after[i] ** 2 for entry in entries[key]) ** 0.5
            assert (before, after) == pytest.approx(
                (touches[step].before ** 0.5, touches[step].after ** 0.5), rel=10 * scenario.subject.rounding, abs=1e-5
            )
