"""The verdict: right on models whose truth was built in, and the rules behind it on made-up numbers."""

import itertools

import numpy as np
import pandas as pd
import pytest

from dit_lens import DiTLens, studies
from dit_lens.errors import OpError, PromptError
from dit_lens.studies.parts.evidence import (
    Thresholds,
    decide_verdict,
    split,
    weigh_decoding,
    weigh_edits,
    weigh_variance,
)
from dit_lens.studies.shared.judges import scene_judge
from tests import planted

PROMPTS = [scene.caption for scene in planted.SCENES]
CALL = {"k": 16, "draws": 1, "judge": scene_judge}


@pytest.mark.parametrize("kind", ["Carrier", "DetailOnly"])
def test_the_planted_truth_is_found(toy, kind, tmp_path):
    lens = DiTLens(planted.pipeline(toy, getattr(planted, kind)), defaults=planted.CALL)
    result = studies.carrier_or_detail(lens, PROMPTS, seeds=[0, 1], out=tmp_path / "study", **CALL)
    rows = result.summary.set_index(["measure", "part"])
    expected = {"Carrier": "carrier", "DetailOnly": "detail"}[kind]
    assert rows.loc[("verdict", "overall"), "says"] == expected
    assert rows.loc[("ablation", "whole"), "says"] == rows.loc[("transport", "whole"), "says"] == expected
    if kind == "Carrier":
        # Neither half of an image's code is the image.
        assert rows.loc["ablation", "value"].min() > 0.9
        assert rows.loc[("transport", "mean"), "value"] < 0.1
        assert rows.loc[("variance", "whole"), "value"] > 0.9
    again = studies.Result.load(tmp_path / "study")
    pd.testing.assert_frame_equal(again.summary, result.summary)
    assert again.notes == result.notes
    assert expected in result.figure().layout.title.text


def test_of_one_seed_variance_is_not_asked(toy):
    lens = DiTLens(planted.pipeline(toy, planted.DetailOnly), defaults=planted.CALL)
    result = studies.carrier_or_detail(lens, PROMPTS[:2], seeds=[0], **CALL)
    assert "variance" not in set(result.summary["measure"])
    assert "variance was not measured: of one seed all that varies depends on the prompt" in result.notes


def test_moving_a_part_moves_that_part_and_no_other(lens):
    from dit_lens import Read
    from dit_lens.studies.carrier_or_detail import make_move

    site, prompts = "blocks.1.img", ["a cat", "two dogs"]
    clean = lens.run(prompts, Read(site, steps=0), seed=0)[site][0]
    for part in ("mean", "residual", "whole"):
        op = make_move(site, {site: (2, 5)}, part, 0, 1)
        got = lens.run(prompts, [op, Read(site, steps=0)], seed=0)[site][0]
        other = {"mean": "residual", "residual": "mean", "whole": None}[part]
        target, source, moved = (x[..., [2, 5]].numpy() for x in (clean[0], clean[1], got[0]))
        assert np.allclose(split(moved, part), split(source, part), atol=1e-5)
        if other:
            assert np.allclose(split(moved, other), split(target, other), atol=1e-5)
        assert np.array_equal(np.delete(got[0].numpy(), [2, 5], -1), np.delete(clean[0].numpy(), [2, 5], -1))
        assert np.array_equal(got[1].numpy(), clean[1].numpy())


def lines(**effects):
    """Effects per arm (and part, after a slash) for three prompts."""
    rows = []
    for name, values in effects.items():
        arm, _, part = name.partition("__")
        rows += [
            {"arm": arm, "part": part or "whole", "draw": 0, "prompt": i, "seed": 0, "effect": v}
            for i, v in enumerate(values)
        ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("effects", "says"),
    [
        ({"top": [0.8, 0.9, 0.7], "bottom": [0.0, 0.1, 0.0]}, "carrier"),
        ({"top": [0.8, 0.9, 0.7], "bottom": [0.0, 0.1, 0.0], "random": [0.9, 0.8, 0.8]}, "neither"),
        ({"top": [0.0, 0.05, 0.0], "bottom": [0.0, 0.0, 0.0]}, "detail"),
        ({"top": [0.0, 0.3, 0.0], "bottom": [0.0, 0.0, 0.0]}, "neither"),
    ],
)
def test_an_edit_speaks_by_its_interval_and_its_strongest_control(effects, says):
    (found,) = weigh_edits(lines(**effects), "effect", Thresholds())
    assert found["says"] == says


def evidence(**says):
    return pd.DataFrame([{"measure": m, "part": "whole", "says": s} for m, s in says.items()])


@pytest.mark.parametrize(
    ("says", "change", "expected"),
    [
        ({"ablation": "carrier", "transport": "carrier", "variance": "present"}, 9, "carrier"),
        ({"ablation": "carrier", "transport": "carrier", "variance": "weak", "decoding": "absent"}, 9, "undecided"),
        ({"ablation": "carrier", "transport": "detail", "variance": "present"}, 9, "undecided"),
        ({"ablation": "detail", "transport": "detail", "variance": "present"}, 9, "detail"),
        ({"ablation": "detail", "transport": "detail"}, 0, "undecided"),
        ({"ablation": "detail"}, 9, "undecided"),
    ],
)
def test_the_rules(says, change, expected):
    assert decide_verdict(evidence(**says), {"whole": change}, Thresholds())["overall"] == expected


def test_both_is_said_of_parts_that_differ():
    table = pd.DataFrame(
        [
            {"measure": measure, "part": part, "says": says}
            for part, says in (("mean", "detail"), ("residual", "carrier"))
            for measure in ("ablation", "transport")
        ]
    )
    assert decide_verdict(table, {"mean": 3.0}, Thresholds())["overall"] == "both"


@pytest.fixture
def images():
    """Values of 8 prompts x 2 seeds: "mean" codes the colour, the residual the side, by what is planted."""
    rng = np.random.default_rng(0)
    attributes = [{"colour": c, "side": s} for c, s in itertools.product(("red", "blue"), ("left", "right"))] * 2

    def values(*, colour, side):
        x = 0.3 * rng.normal(size=(1, 16, 16, 3))
        x -= x.mean(2, keepdims=True)
        x += 0.3 * rng.normal(size=(1, 16, 1, 3))
        for m in range(16):
            one = attributes[m % 8]
            x[0, m] += colour * (1 if one["colour"] == "red" else -1)
            half = np.where(np.arange(16) % 4 < 2, 1, -1)[:, None]
            x[0, m] += side * half * (1 if one["side"] == "left" else -1)
        return {"blocks.0.img": x}

    return attributes * 2, list(range(8)) * 2, values


def test_information_is_found_in_the_part_that_holds_it(images):
    attributes, groups, values = images
    both = {"top": values(colour=2, side=0), "bottom": values(colour=0, side=0)}
    found = {f["part"]: f for f in weigh_decoding(both, attributes, groups, (4, 4), Thresholds())}
    assert found["mean"]["value"] > 0.3 > found["residual"]["value"]  # the colour alone: at most half of the skill
    shares = {f["part"]: f["value"] for f in weigh_variance(both, 8, Thresholds())}
    assert shares["mean"] > 0.9
    both = {"top": values(colour=0, side=2), "bottom": values(colour=0, side=0)}
    found = {f["part"]: f for f in weigh_decoding(both, attributes, groups, (4, 4), Thresholds())}
    assert found["residual"]["value"] > 0.3 > found["mean"]["value"]


def test_what_cannot_be_judged_or_moved_is_refused(lens):
    with pytest.raises(OpError, match="pass judge="):
        studies.carrier_or_detail(lens, ["a cat", "two dogs"], k=4)
    with pytest.raises(PromptError, match="single prompt"):
        studies.carrier_or_detail(lens, ["a cat", "two dogs"], k=4, judge=scene_judge, batch_size=1)
