"""A sweep is the study at every combination: the same numbers, in folders that go on, in one table and one figure."""

import numpy as np
import pandas as pd
import pytest

from dit_lens import DiTLens, plots, sigma
from dit_lens.errors import OpError, SiteError, StoreError, StudyInterrupted
from dit_lens.studies import Result, disruption, sweep
from dit_lens.studies.shared import slots
from tests import pipelines

PROMPTS = ["a cat", "two dogs"]
OVER = {"site": ["blocks[0:2].img", "blocks[2:5].img"], "steps": [(0.0, 0.5), (0.5, 1.0)]}
FIXED = {"k": 4, "draws": 1, "confounds": False, "num_inference_steps": 2}
LABELS = [(site, steps) for site in OVER["site"] for steps in ("0 to 0.5", "0.5 to 1")]


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps") / "whole"


@pytest.fixture(scope="module")
def whole(lens, folder):
    return sweep("disruption", lens, PROMPTS, over=OVER, out=folder, **FIXED)


@pytest.fixture
def runs(lens, monkeypatch):
    count, run = [], lens.run
    monkeypatch.setattr(lens, "run", lambda *args, **call: count.append(1) or run(*args, **call))
    return count


def assert_same(one, other):
    for table in ("table", "summary"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert {name: p.tobytes() for name, p in one.images.items()} == {
        name: p.tobytes() for name, p in other.images.items()
    }
    assert (one.settings, one.notes) == (other.settings, other.notes)


def test_every_combination_is_the_study_alone(lens, whole):
    assert list(whole.table)[:2] == list(whole.summary)[:2] == ["site", "steps"]
    points = [(site, steps) for site in OVER["site"] for steps in OVER["steps"]]
    for (site, steps), (_, said) in zip(points, LABELS, strict=True):
        alone = disruption(lens, PROMPTS, site=site, steps=steps, **FIXED)
        for kind in ("table", "summary"):
            part = getattr(whole, kind).query("site == @site and steps == @said").drop(columns=["site", "steps"])
            pd.testing.assert_frame_equal(part.reset_index(drop=True), getattr(alone, kind), check_exact=True)
        key = "0/0/4/top"
        assert whole.images[f"site={site}, steps={said}/{key}"].tobytes() == alone.images[key].tobytes()
    assert whole.table.groupby(["site", "steps"]).ngroups == 4
    assert whole.notes.count("k=4 is 12.5% of 32 channels") == 1
    assert f"site={LABELS[0][0]}, steps={LABELS[0][1]}: k=4: top changes" in "\n".join(whole.notes)


def test_a_sweep_loads_without_the_model_and_has_nothing_left_to_do(lens, whole, folder, runs):
    assert_same(Result.load(folder), whole)
    assert_same(sweep(disruption, lens, PROMPTS, over=OVER, out=folder, **FIXED), whole)
    assert not runs
    assert Result.load(folder / "parts" / "000002").study == "disruption"


def test_ctrl_c_in_a_combination_leaves_the_others_and_its_cells(lens, whole, tmp_path, monkeypatch):
    """Again and again: it goes on from each time."""
    write, written = slots.write_cell, []
    for done in (0, 5, 9):

        def interrupted(*args, done=done):
            if len(written) == done:
                raise KeyboardInterrupt
            written.append(1)
            write(*args)

        monkeypatch.setattr(slots, "write_cell", interrupted)
        with pytest.raises(StudyInterrupted, match=f"sweep was interrupted after {done // 6} of 4") as stop:
            sweep("disruption", lens, PROMPTS, over=OVER, out=tmp_path, **FIXED)
        part = stop.value.result
        if done == 0:
            assert part is None
            with pytest.raises(StoreError, match="sweep study with nothing finished yet"):
                Result.load(tmp_path)
        else:
            assert len(part.table) == done * 2
            assert_same(Result.load(tmp_path), part)
    monkeypatch.setattr(slots, "write_cell", lambda *args: written.append(1) or write(*args))
    assert_same(sweep("disruption", lens, PROMPTS, over=OVER, out=tmp_path, **FIXED), whole)
    assert len(written) == 4 * 6  # no cell twice: untouched, no-op, top, bottom, random, energy-matched


def test_one_bar_counts_it_all(lens, capsys):
    capsys.readouterr()
    sweep("disruption", lens, "red", over={"k": [2, 4]}, draws=1, confounds=False, num_inference_steps=1)
    said = capsys.readouterr().err
    assert "sweep: 100%" in said
    assert "disruption" not in said


def test_any_argument_can_be_swept(lens):
    over = {"k": [2, 4], "seeds": [[0], [1, 2]], "num_inference_steps": [1]}
    result = sweep("disruption", lens, "red", over=over, draws=1, confounds=False)
    assert list(result.summary)[:3] == ["k", "seeds", "num_inference_steps"]
    assert set(result.table["k"]) == {2, 4}
    assert result.table.groupby("seeds")["seed"].unique().map(list).to_dict() == {"0": [0], "1, 2": [1, 2]}
    with_judge = sweep(
        "disruption", lens, "red", over={"steps": [slice(0, 1), [0], sigma(1.5, 0.0)]}, k=2, draws=1, confounds=False,
        num_inference_steps=1,
    )  # fmt: skip
    assert list(with_judge.summary["steps"].unique()) == ["0:1", "0", "sigma 1.5 to 0"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"study": "disrupt"}, OpError, r"'disrupt' is not a valid study to sweep\. Nearest: 'disruption'"),
        ({"study": "sweep"}, OpError, "'sweep' is not a valid study to sweep"),
        ({"over": {}}, OpError, "asks for nothing"),
        ({"over": {"k": []}}, OpError, "takes a list of values, at least one"),
        ({"over": {"site": "blocks.*.img"}}, OpError, "Give a mapping from a string to a list"),
        ({"over": {"draws": [1, 2]}}, OpError, "draws cannot be swept and given at once"),
        ({"over": {"seeds": [[0], [0]]}}, OpError, "has a value twice"),
        # The last combination is wrong, and nothing is drawn for the first.
        ({"over": {"k": [2, 17]}}, OpError, "k=17 leaves no control"),
        ({"over": {"site": ["blocks.0.img", "blocks.9.img"]}}, SiteError, "9"),
    ],
)
def test_mistakes_raise_before_anything_is_drawn(lens, runs, change, error, said, tmp_path):
    fixed = {name: value for name, value in FIXED.items() if name not in change["over"]} if "over" in change else FIXED
    if "draws" in change.get("over", ()):
        fixed = FIXED
    with pytest.raises(error, match=said):
        sweep(
            **{"study": "disruption", "lens": lens, "prompts": PROMPTS, "over": OVER, **fixed, **change}, out=tmp_path
        )
    assert not runs
    assert not list(tmp_path.iterdir())


def test_another_sweep_is_refused(lens, whole, folder, runs):
    with pytest.raises(StoreError, match="another setting; over: "):
        sweep("disruption", lens, PROMPTS, over={**OVER, "steps": [(0.0, 1.0)]}, out=folder, **FIXED)
    with pytest.raises(StoreError, match=r"another setting; fixed: .*draws"):
        sweep("disruption", lens, PROMPTS, over=OVER, out=folder, **{**FIXED, "draws": 2})
    with pytest.raises(StoreError, match="holds the study 'sweep'"):
        disruption(lens, PROMPTS, out=folder, **FIXED)
    assert not runs


# The figure.


def test_the_figure_has_lines_over_the_first_argument_and_panels_for_the_second(whole):
    figure = whole.figure()
    assert [note.text for note in figure.layout.annotations] == ["steps 0 to 0.5", "steps 0.5 to 1"]
    names = [plots.ARMS[arm].name for arm in ("top", "bottom", "random", "energy-matched")]
    assert [line.name for line in figure.data] == names * 2
    rows = whole.summary.query("arm == 'top' and steps == '0.5 to 1'")
    line = figure.data[4]
    assert line.y.tolist() == rows["rmse"].tolist()
    assert line.line.color == plots.ARMS["top"].colour
    np.testing.assert_allclose(line.error_y.array, rows["rmse_high"] - rows["rmse"])
    assert figure.layout.xaxis.ticktext == tuple(OVER["site"])
    assert figure.layout.xaxis.title.text == "site"


def test_other_measures_and_the_keys_of_a_study():
    blocks = [
        {"site": site, "block": block, "arm": arm, "n": 4, "iou": 0.1 * block, "low": 0.0, "high": 1.0, "size": 0.5}
        for site in ("early", "late")
        for block in (1, 2)
        for arm in ("top", "no-op")
    ]
    summary = pd.DataFrame(blocks)
    figure = plots.sweep_figure(summary, ["site"])
    assert [note.text for note in figure.layout.annotations] == ["block 1", "block 2"]
    assert [line.y.tolist() for line in figure.data] == [[0.1, 0.1], [0.2, 0.2]]
    assert figure.data[0].error_y.array.tolist() == [0.9, 0.9]
    assert plots.sweep_figure(summary, ["site"], "size").layout.yaxis.title.text == "size"
    with pytest.raises(OpError, match=r"no measure 'iuo'\. Nearest: 'iou'"):
        plots.sweep_figure(summary, ["site"], "iuo")
    with pytest.raises(OpError, match="no edited images"):
        plots.sweep_figure(summary[summary["arm"] == "no-op"], ["site"])
    many = pd.concat([summary.assign(k=k) for k in range(7)])[["site", "k", *summary.columns[1:]]]
    with pytest.raises(OpError, match=r"14 panels are too many: k \(7\), block \(2\)"):
        plots.sweep_figure(many, ["site", "k"])
