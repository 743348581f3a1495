"""Reads as arrays with named axes: values and coordinates are those of the tensors."""

import sys

import numpy as np
import pytest
import torch

from dit_lens import DiTLens, Read
from dit_lens.errors import OpError
from tests import pipelines

CALL = {**pipelines.CALL, "seed": 3}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


def read(lens, *reads, **call):
    return lens.run("red", list(reads), **{**CALL, **call})


def test_axes_and_coordinates_are_those_of_the_read(lens):
    run = read(
        lens,
        Read(["blocks.0.img", "blocks.2.img"], steps=[1, 0], channels=[5, 2], branch="cond", name="x"),
        Read("blocks.1.txt", tokens=[3, 1], name="t"),
        Read("blocks.1.{img,txt}", name="two"),
    )
    found = run["x"].to_xarray()
    assert set(found) == {"blocks.0.img", "blocks.2.img"}
    one = found["blocks.2.img"]
    assert one.dims == ("step", "row", "h", "w", "channel")
    assert (one.step.values.tolist(), one.channel.values.tolist()) == ([1, 0], [5, 2])
    assert one.sigma.values.tolist() == pytest.approx([run.sigmas[1], run.sigmas[0]])
    wanted = run["x"]["blocks.2.img"].grid()
    assert np.array_equal(one.sel(step=0, channel=2).values, wanted[1, ..., 1].numpy())
    text = run["t"].to_xarray()["blocks.1.txt"]
    assert (text.dims, text.token.values.tolist()) == (("step", "row", "token", "channel"), [3, 1])
    both = run["two"].to_xarray()
    assert "token of blocks.1.txt" in both["blocks.1.txt"].dims
    assert both["blocks.1.img"].dims[2:4] == ("h", "w")


@pytest.mark.parametrize(
    ("reduce", "axes"),
    [
        ("|mean|", ("channel",)),
        ("topk(3)", ("rank", "of_rank")),
        ("histogram(-2,2,8)", ("channel", "bin")),
        ("quantile(0.1,0.9)", ("channel", "quantile")),
        ("p99", ("channel",)),
    ],
)
def test_reductions_have_names_too(lens, reduce, axes):
    found = read(lens, Read("blocks.1.img", reduce=reduce, name="x"))["x"]
    labelled = found.to_xarray()["blocks.1.img"]
    assert labelled.dims == ("step", "row", *axes)
    assert np.array_equal(labelled.values, found["blocks.1.img"].numpy())
    if "quantile" in axes:
        assert labelled["quantile"].values.tolist() == [0.1, 0.9]


def test_half_precision_and_what_is_no_data(lens):
    found = read(lens, Read("blocks.1.txt", name="x"))["x"]
    half = type(found)(**{**vars(found), "tensors": {site: one.bfloat16() for site, one in found.tensors.items()}})
    assert half.to_xarray()["blocks.1.txt"].dtype == np.float32
    mask = torch.ones(found.tensors["blocks.1.txt"].shape[1:3], dtype=torch.bool)
    mask[0, 2] = False
    masked = type(found)(**{**vars(found), "masks": {"blocks.1.txt": mask}})
    values = masked.to_xarray()["blocks.1.txt"]
    assert np.isnan(values.values[:, 0, 2]).all()
    assert np.isfinite(values.values).sum() == values.size - values.shape[0] * values.shape[-1]


def test_without_xarray_it_is_said(lens, monkeypatch):
    found = read(lens, Read("blocks.1.img", name="x"))["x"]
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(OpError, match=r"dit_lens\[xarray\]"):
        found.to_xarray()
