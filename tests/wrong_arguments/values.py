"""Values that are wrong nearly everywhere, and some that look wrong and are right: numbers of numpy and torch."""

import fractions
import itertools
import os
import pathlib

import numpy as np
import pandas as pd
import torch
from PIL import Image


class Odd:
    """An object that fits nowhere."""

    def __init__(self, *given, **named):
        pass


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def make_guises(value):
    """name -> the same numbers of another type, in another container, shape or order in memory."""
    found = {}
    if isinstance(value, float) and value.is_integer():
        found["whole"] = int(value)
    if isinstance(value, bool | int | float):
        found |= {"numpy": np.array(value)[()], "array []": np.array(value), "torch": torch.tensor(value)}
    if isinstance(value, list | tuple) and value:
        found |= {"list": list(value), "tuple": tuple(value), "one-shot": iter(value)}
        if all(isinstance(one, int | float) for one in value):
            found |= {"whole": [int(one) for one in value], "array": np.array(value), "torch": torch.tensor(value)}
            found |= {"reversed view": np.array(value[::-1])[::-1], "column": np.array(value)[:, None]}
    if isinstance(value, np.ndarray | torch.Tensor):
        array = np.asarray(value)
        found |= {"list": array.tolist(), "flat": array.ravel(), "one more axis": array[None]}
        found |= {"float64": array.astype(float), "fortran": np.asfortranarray(array), "torch": torch.tensor(array)}
        found |= {"sparse": torch.tensor(array).to_sparse(), "meta": torch.tensor(array).to("meta")}
        found |= {
            "strided": np.repeat(array, 2, 0)[::2],
            "graph": torch.tensor(array.astype(float), requires_grad=True),
        }
    return found


def make_values(folder):
    """name -> function that makes the value afresh; one-shot iterables are used up by a call.

    folder: an empty folder for those that are paths.
    """
    file = folder / "file"
    file.write_text("text")
    return {
        "None": lambda: None,
        "True": lambda: True,
        "0": lambda: 0,
        "-1": lambda: -1,
        "7": lambda: 7,
        "10**9": lambda: 10**9,
        "10**400": lambda: 10**400,
        "-10**20": lambda: -(10**20),
        "1.5": lambda: 1.5,
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "1e300": lambda: 1e300,
        "complex": lambda: 1 + 2j,
        "fraction": lambda: fractions.Fraction(1, 3),
        "empty text": lambda: "",
        "text": lambda: "a word",
        "digit": lambda: "2",
        "percent": lambda: "%s {0} <b> \\",
        "surrogate": lambda: "red \ud83d",
        "NUL": lambda: "a\0b",
        "long text": lambda: "x" * 5000,
        "bytes": lambda: b"red",
        "bytearray": lambda: bytearray(b"red"),
        "path": lambda: file,
        "under a file": lambda: file / "under",
        "missing": lambda: folder / "missing",
        "folder": lambda: folder,
        "unwritable": lambda: pathlib.Path("/proc/1/nothing"),
        "device": lambda: "cuda:7",
        "[]": list,
        "()": tuple,
        "{}": dict,
        "set": lambda: {1, 2},
        "[1, 2]": lambda: [1, 2],
        "[-1]": lambda: [-1],
        "[10**9]": lambda: [10**9],
        "[nan]": lambda: [float("nan")],
        "[None]": lambda: [None],
        "mixed": lambda: [1, "a", None],
        "ragged": lambda: [[1.0], [1.0, 2.0]],
        "texts": lambda: ["a", "b"],
        "nested": lambda: nested(200),
        "range": lambda: range(2),
        "generator": lambda: (i for i in (1, 2)),
        "endless": itertools.count,
        "{site: None}": lambda: {"blocks.0.img": None},
        "{site: text}": lambda: {"blocks.0.img": "x"},
        "{site: [nan]}": lambda: {"blocks.0.img": [float("nan")]},
        "{1: 2}": lambda: {1: 2},
        "{None: []}": lambda: {None: []},
        "object": Odd,
        "type": lambda: Odd,
        "function": lambda: lambda *given, **named: None,
        "environment": lambda: os.environ,
        "numpy int": lambda: np.int64(1),
        "numpy bool": lambda: np.bool_(1),
        "numpy float": lambda: np.float32(0.5),
        "numpy text": lambda: np.str_("red"),
        "numpy complex": lambda: np.complex64(1),
        "array 0": lambda: np.zeros(0),
        "array []": lambda: np.array(1.0),
        "array [3]": lambda: np.ones(3),
        "array nan": lambda: np.full((4, 4), np.nan),
        "array [4, 4]": lambda: np.ones((4, 4)),
        "array bool": lambda: np.ones((4, 4), bool),
        "array objects": lambda: np.array([Odd, None], dtype=object),
        "array texts": lambda: np.array(["a", "b"]),
        "array 5d": lambda: np.zeros((1, 1, 1, 1, 1)),
        "array [0, 3]": lambda: np.zeros((0, 3)),
        "torch int": lambda: torch.tensor(1),
        "torch float": lambda: torch.tensor(0.5),
        "tensor [2]": lambda: torch.tensor([1, 2]),
        "tensor [3]": lambda: torch.ones(3),
        "tensor [4, 4]": lambda: torch.ones(4, 4),
        "tensor bool": lambda: torch.ones(4, 4, dtype=torch.bool),
        "tensor half": lambda: torch.ones(4, dtype=torch.float16),
        "tensor bfloat16": lambda: torch.ones(4, 4, dtype=torch.bfloat16),
        "tensor float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
        "tensor meta": lambda: torch.ones(4, device="meta"),
        "tensor complex": lambda: torch.ones(4, dtype=torch.complex64),
        "tensor sparse": lambda: torch.eye(4).to_sparse(),
        "tensor graph": lambda: torch.ones(4, requires_grad=True),
        "tensor nan": lambda: torch.tensor([1.0, float("nan"), 2.0]),
        "tensor empty": lambda: torch.empty(0),
        "image": lambda: Image.new("RGB", (8, 8)),
        "image P": lambda: Image.new("P", (4, 4)),
        "image 1 pixel": lambda: Image.new("L", (1, 1)),
        "images": lambda: [Image.new("RGB", (8, 8)), Image.new("RGB", (4, 8))],
        "table": lambda: pd.DataFrame({"a": [1]}),
        "empty table": pd.DataFrame,
        "generator of noise": torch.Generator,
        "list of surrogates": lambda: ["red \ud83d"],
        "{surrogate: 1}": lambda: {"\ud83d": 1},
        "meta []": lambda: torch.ones((), device="meta"),
        "sparse []": lambda: torch.tensor(1.0).to_sparse(),
        "10**12": lambda: 10**12,
        "1e39": lambda: 1e39,
        "dot": lambda: ".",
        "no parameters": lambda: lambda: None,
        "five parameters": lambda: lambda a, b, c, d, e: None,
        "answers text": lambda: lambda *given, **named: "x",
        "answers complex": lambda: lambda *given, **named: torch.tensor(1j),
        "module": torch.nn.Identity,
        "[inf]": lambda: [float("inf")],
        "array inf": lambda: np.full((4, 4), np.inf),
    }
