"""Every reduction equals its numpy form, and the module can travel."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens.core.request import reduce
from dit_lens.core.request.reduce import REDUCTIONS, parse, reduce_tokens

SPECS = [
    "mean",
    "|mean|",
    "mean|x|",
    "rms",
    "max",
    "p99.9",
    "quantile(0, 0.25, 0.5, 1)",
    "histogram(-1, 2, 5)",
    "topk(2)",
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_numpy(x: torch.Tensor, spec: list) -> np.ndarray:
    values = x.double().numpy()
    name, *args = spec
    magnitudes, means = np.abs(values), values.mean(1)
    if name == "quantile":
        result = np.moveaxis(np.quantile(magnitudes, args, axis=1), 0, -1)
        return result[..., 0] if len(args) == 1 else result
    if name == "histogram":
        low, high, bins = args
        edges = torch.linspace(low, high, bins + 1).double().numpy()
        columns = np.clip(values, low, high).transpose(0, 2, 1)
        return np.apply_along_axis(lambda column: np.histogram(column, edges)[0], 2, columns)
    if name == "topk":
        order = np.argsort(-np.abs(means), axis=1, kind="stable")[:, : args[0]]
        return np.stack([np.take_along_axis(np.abs(means), order, 1), order], -1)
    return {
        "mean": lambda: means,
        "|mean|": lambda: np.abs(means),
        "mean|x|": lambda: magnitudes.mean(1),
        "rms": lambda: np.sqrt((values**2).mean(1)),
        "max": lambda: magnitudes.max(1),
    }[name]()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 7)),
    st.integers(0, 10**6),
    st.sampled_from([1, 2**22]),
)
def test_equals_numpy(text, dtype, shape, seed, chunk):
    rows, tokens, width = shape
    # A slice, as image tokens behind text tokens are: not contiguous.
    x = torch.randn(rows, tokens + 3, width, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, 3:]
    before, spec = x.clone(), parse(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "CHUNK", chunk)
        result = reduce_tokens(x, spec)
    assert result.dtype == torch.float32
    assert torch.equal(x, before)
    np.testing.assert_allclose(result.numpy(), by_numpy(x, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", SPECS)
def test_accumulates_in_float32(text):
    x = (torch.randn(1, 3000, 3, generator=torch.Generator().manual_seed(0)) + 200).to(torch.bfloat16)
    np.testing.assert_allclose(reduce_tokens(x, parse(text)).numpy(), by_numpy(x, parse(text)), rtol=2e-5)


def test_half_precision_does_not_overflow():
    x = torch.full((1, 4096, 1), 60000.0, dtype=torch.float16)
    for name in ("mean", "|mean|", "mean|x|", "rms", "max"):
        assert reduce_tokens(x, [name]).item() == pytest.approx(60000 - 60000 % 32, rel=1e-3)


def test_more_elements_than_torch_quantile_takes():
    x = torch.zeros(1, 2**24 + 2, 1, dtype=torch.float16)
    x[0, :3] = 5.0
    assert reduce_tokens(x, ["quantile", 1.0]).tolist() == [[5.0]]


def test_histogram_clips_and_keeps_the_count():
    x = torch.tensor([-100.0, -1.0, 0.0, 0.999, 1.0, 100.0]).reshape(1, 6, 1)
    assert reduce_tokens(x, ["histogram", -1, 1, 2]).tolist() == [[[2.0, 4.0]]]
    assert reduce_tokens(x, ["histogram", -1, 1, 1]).tolist() == [[[6.0]]]


def test_nan_is_passed_on_and_not_counted():
    x = torch.tensor([1.0, float("nan"), 3.0]).reshape(1, 3, 1)
    for spec in (["mean"], ["|mean|"], ["mean|x|"], ["rms"], ["max"], ["quantile", 0.0], ["quantile", 0.5]):
        assert reduce_tokens(x, spec).isnan().all(), spec
    assert reduce_tokens(x, ["histogram", 0, 4, 2]).tolist() == [[[1.0, 1.0]]]


def test_topk_gives_ties_to_the_lower_channel():
    assert reduce_tokens(torch.ones(1, 2, 300), ["topk", 3])[0, :, 1].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (" rms ", ["rms"]),
        ("p50", ["quantile", 0.5]),
        ("p99.9", ["quantile", 0.999]),
        ("p0", ["quantile", 0.0]),
        ("quantile(0.5,0.9)", ["quantile", 0.5, 0.9]),
        ("histogram( -1e1, 10 ,64)", ["histogram", -10.0, 10.0, 64]),
        ("topk(12)", ["topk", 12]),
    ],
)
def test_parse(text, spec):
    assert parse(text) == spec
    assert parse(json.loads(json.dumps(spec))) == spec


@pytest.mark.parametrize("spec", REDUCTIONS[:5])
def test_names_are_their_own_spec(spec):
    assert parse(spec) == [spec] == parse([spec])


@pytest.mark.parametrize(
    "spec",
    [
        "quantile", "quantile()", "quantile(1.5)", "quantile(-0.1)", "quantile(nan)", "p101", "quantile(half)",
        "histogram", "histogram(1, 1, 4)", "histogram(2, 1, 4)", "histogram(0, 1, 0)", "histogram(0, 1, 2.5)",
        "histogram(-inf, 1, 4)", "topk", "topk(0)", "topk(1.5)", "topk(1, 2)", ["topk", True], "mean(3)", ["rms", 1],
    ],
)  # fmt: skip
def test_bad_numbers_are_refused_with_the_form_to_write(spec):
    with pytest.raises(ValueError, match=r"cannot take .*\. Write (quantile\(q|histogram\(low|topk\(k|mean\.|rms\.)"):
        parse(spec)


@pytest.mark.parametrize("spec", ["meen", "median", "", "p", "mean)", [], [3]])
def test_unknown_names_list_what_exists(spec):
    with pytest.raises(ValueError, match=r"is not a valid reduction.* There are: mean, \|mean\|, .*topk\(k\)"):
        parse(spec)


def test_nearest_name_is_offered():
    with pytest.raises(ValueError, match=r"'histgram' is not a valid reduction\. Nearest: 'histogram'\."):
        parse("histgram(0, 1, 2)")


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(1, 0, 3), torch.ones(1, 2, 3, dtype=torch.int64)])
def test_tensors_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match=r"takes floating-point activations \[b, n, d\] with at least one token"):
        reduce_tokens(x, ["mean"])


def test_topk_of_too_few_channels_is_refused():
    with pytest.raises(ValueError, match=r"topk\(4\) was asked of 3 channels"):
        reduce_tokens(torch.ones(1, 2, 3), ["topk", 4])


def test_the_source_alone_is_enough():
    source = Path(reduce.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= {"__future__", "collections", "difflib", "math", "re", "torch", "typing"}
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    alone: dict = {"__name__": "elsewhere"}
    exec(compile(source, "elsewhere", "exec"), alone)
    assert alone["reduce_tokens"](torch.ones(1, 2, 3), "p50").tolist() == [[1.0, 1.0, 1.0]]
