"""A run.json as nobody wrote it: loading refuses it, or what loads can be shown, tabulated and saved again.

Every place of the file, at any depth, is replaced by every odd value, left out, doubled, or named otherwise.
"""

import contextlib
import copy
import json
import random
import warnings

import pytest

from dit_lens import Add, Read, Run
from dit_lens.errors import DitLensError, StoreError

ODD = [
    None, True, -1, 0, 7, 10**30, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\ud800", "a\0b",
    "../../etc/passwd", [], [[]], {}, {"a": 1}, {"\ud800": 1}, [1, "a"], [True], [-1], [10**9], [0.5], ["\ud800"],
]  # fmt: skip
TRIED = 3  # of these at every place


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(scope="module")
def folder(cfg_lens, tmp_path_factory):
    ops = [
        Read("blocks.0.img", channels=[1, 2], tokens=[0, 3]),
        Read("blocks.1.txt", reduce="mean", name="mean", branch="both"),
        Read("blocks.1.img", reduce="histogram(-1,1,4)", name="many", steps=0),
        Add("blocks.2.img", value=1.0, channels=[0], rows=0),
    ]
    return cfg_lens.run(["red", "blue"], ops, seed=[0, 5]).save(tmp_path_factory.mktemp("hostile") / "run")


def places(value, path=()):
    """The paths of everything in a JSON value; of long lists their first two entries, of settings the first ones."""
    yield path
    few = 3 if path[-1:] and path[-1] in ("call", "transformer", "scheduler", "versions") else None
    inner = (
        list(value.items())[:few]
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, one in inner:
        yield from places(one, (*path, key))


def change(data, path, how):
    """A copy in which ``how(mapping or list, key)`` was done to one place."""
    data = copy.deepcopy(data)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    how(inside, path[-1])
    return data


def replace(value):
    return lambda inside, key: inside.__setitem__(key, value)


def remove(inside, key):
    del inside[key]


def double(inside, key):
    if isinstance(inside, list):
        inside.insert(key, inside[key])
    else:
        inside[f"{key} again"] = inside[key]


def use(run, place):
    """Everything that can be done with a run without its model."""
    repr(run)
    run._repr_html_()
    repr(run.receipt)
    run.receipt._repr_html_()
    run.numpy()
    assert len(list(run)) == len(run)
    for reading in run.readings:
        for site in reading:
            reading.by_branch(site)
            if site in reading.on_grid:
                try_told(reading[site].grid)
    try_told(run.to_pandas)
    Run.load(run.save(place, overwrite=True))


def try_told(call):
    with contextlib.suppress(DitLensError):
        call()


def test_what_loads_can_be_used(folder, tmp_path):
    file = folder / "run.json"
    before = file.read_text()
    data, rng, bad, loaded = json.loads(before), random.Random(0), [], 0
    places_ = [path for path in places(data) if path]
    changes = [(path, replace(odd), odd) for path in places_ for odd in rng.sample(ODD, TRIED)]
    changes += [(path, how, how.__name__) for path in places_ for how in (remove, double)]
    changes += [(path, replace(nested(depth)), depth) for depth in (90, 150, 900) for path in rng.sample(places_, 8)]
    for path, how, name in changes:
        file.write_text(json.dumps(change(data, path, how)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    run = Run.load(folder)
                except StoreError:
                    continue
                loaded += 1
                use(run, tmp_path / "again")
        except Exception as problem:  # noqa: BLE001 what else it may be is the question
            bad.append(f"{'.'.join(map(str, path))} {name!r}: {problem!r}"[:300])
    file.write_text(before)
    use(Run.load(folder), tmp_path / "again")
    assert not bad, f"{len(bad)}\n" + "\n".join(bad[:40])
    assert loaded
