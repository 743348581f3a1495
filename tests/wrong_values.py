"""Values of all kinds, most of them wrong wherever they are given."""

import itertools
import re

import numpy as np
import torch
from hypothesis import strategies as st

from dit_lens import Read, sigma

SITE, OTHER = "blocks.3.img", "blocks.1.txt"


class Plain:
    """An object that is nothing in particular."""

    def __repr__(self):
        return "Plain()"


def answer(value):
    """A function that gives the same for every name, or tensor and hook."""
    return lambda *_: value


NAN = float("nan")
NUMBERS = st.sampled_from(
    [
        *(0, 1, -1, 2, 7, -8, 31, 32, 10**9, -(10**30), 10**400, True, False, 1j, None),
        *(0.0, 0.5, -0.25, 1.5, 1e300, NAN, float("inf"), -float("inf")),
        *(np.int8(1), np.uint64(2**63), np.float16(0.5), np.float64(NAN), np.bool_(True), np.complex64(1j)),
        *(torch.tensor(1), torch.tensor(0.5), torch.tensor(True), torch.tensor(1j), torch.tensor([1])),
        *(torch.tensor(1, device="meta"), np.array(1), np.array(0.5)),
    ]
)
WORDS = st.one_of(
    st.sampled_from(
        [
            *("", "row:0", "row:-1", "row:5", "row:" + "9" * 5000, "cond", "uncond", "both", "mean", "red", "*"),
            *(SITE, OTHER, "blocks.*.img", "blocks[-:].img", "blocks." + "9" * 5000 + ".img", "velocity", "x0"),
            *("topk(999)", "topk(0)", "p200", "histogram(0,1,1e3)", "histogram(-1e300,1,4)", "quantile()"),
            *("histogram(-1,1," + "9" * 400 + ")", "quantile(nan)", "\ud800", "\0", "residual"),
            *(b"\x01\x02", bytearray(b"ab"), memoryview(b"ab")),
        ]
    ),
    st.text(max_size=8),
)
SIZES = st.lists(st.sampled_from([0, 1, 1, 2, 16, 32, 33]), max_size=5).filter(lambda size: np.prod(size) < 10_000)
ARRAYS = st.one_of(
    st.builds(np.ones, SIZES, st.sampled_from(["f4", "f8", "i8", "?", "c8", "O", ">f4"])),
    st.builds(
        lambda size, dtype: torch.ones(size).to(dtype),
        SIZES,
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
    ),
    st.sampled_from(
        [
            torch.full((32,), NAN),
            torch.full((32,), float("inf")),
            torch.ones(32, device="meta"),
            torch.ones(4, 4).to_sparse(),
            torch.ones(32, requires_grad=True),
            np.arange(32.0)[::-1],
            np.array(None),
            np.array(["a", "b"]),
        ]
    ),
)
OBJECTS = st.one_of(
    st.sampled_from([Plain(), Plain, int, Read, Read(SITE), Ellipsis, re.compile("a"), len, torch.nn.Identity()]),
    st.sampled_from([range(10**18), range(0), range(3, 0, -1), {1, 2}, frozenset([0]), dict.fromkeys("ab").keys()]),
    st.builds(itertools.count),
    st.sampled_from([sigma(1.0, 0.0), sigma(1.0, 0.99), answer(None), lambda: 1, lambda x, y, z: None]),
)
KEYS = st.sampled_from([SITE, OTHER, "cond", "uncond", "blocks.9.img", 0, None])


def several(one):
    """Lists, tuples, sets, one-shot iterables, mappings, slices and functions of values."""
    some = st.lists(one, max_size=3)
    return st.one_of(
        some,
        some.map(tuple),
        some.map(iter),
        some.map(lambda values: (value for value in values)),
        st.dictionaries(KEYS, one, max_size=2),
        st.builds(slice, one, one, one),
        one.map(answer),
    )


VALUES = st.recursive(st.one_of(NUMBERS, WORDS, ARRAYS, OBJECTS), several, max_leaves=5)
